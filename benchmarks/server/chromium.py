"""Headless Chromium, to look at the live view: for its picture and its tests. Linux; driven through selenium."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from echo_rl.errors import ConfigError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def start(profile: str) -> Chrome:
    """`profile` is a folder for what it writes. Raises `ConfigError` where something is not installed."""
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise ConfigError("the live view is looked at in Chromium; install chromium and chromedriver")
    try:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise ConfigError("Chromium is driven through selenium; install it (the dev extra has it)") from error
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options, Service(driver))


def dress(chrome: Chrome, size: tuple[int, int], scale: float = 1.0, mobile: bool = False, **features: str) -> None:
    """The window's size in CSS pixels, how many device pixels each has, and media features by name."""
    view: dict[str, Any] = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": mobile}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
