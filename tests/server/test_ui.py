"""The live view in a real browser: what it shows is what the server said, and its buttons do what they say."""

from __future__ import annotations

import pytest

from benchmarks.server import chromium
from echo_rl.contracts import RequestTree
from echo_rl.errors import ConfigError
from echo_rl.server.api.auth import Keys
from tests.server.front_world import changed, listening, make_app, wait_until
from tests.server.live_world import LiveWorld, LiveWorldClient

WIDE, PHONE = (1280, 800), (390, 844)

pytest.importorskip("selenium", reason="the live view is tested through selenium: install it")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys as Key  # noqa: E402


class Browser:
    """A page of the browser, by what a test wants to know of it."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.js = driver.execute_script

    def __getitem__(self, id: str):
        return self.driver.find_element(By.ID, id)

    def open(self, url: str, size=WIDE, scheme: str = "dark", motion: str = "reduce") -> None:
        features = {"prefers_color_scheme": scheme, "prefers_reduced_motion": motion}
        chromium.dress(self.driver, size, mobile=size is PHONE, **features)
        self.driver.get(f"{url}/ui")
        self.js("sessionStorage.clear()")

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def all(self, selector: str, attribute: str) -> list[float]:
        return [float(node.get_attribute(attribute)) for node in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait_text(self, id: str, *parts: str) -> None:
        wait_until(lambda: all(part in self[id].text for part in parts))

    def fill(self, id: str, text: str) -> None:
        self[id].clear()
        self[id].send_keys(text)

    def errors(self) -> list[str]:
        """What the console complains about, failed loads that a test provokes left out."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["source"] != "network" and e["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    try:
        driver = chromium.start(str(tmp_path_factory.mktemp("chromium")))
    except ConfigError as error:
        pytest.skip(str(error))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    browser = Browser(driver)
    browser.errors()
    yield browser
    assert browser.errors() == []
    driver.get("about:blank")


@pytest.fixture
def engine_client():
    return LiveWorldClient(LiveWorld(requests=5))


@pytest.fixture
def url(engine_client):
    with listening(make_app(engine_client)) as url:
        yield url


class StillHost(LiveWorldClient):
    """Says the same step again and again, a second of the server later."""

    def advance(self):
        self.step = changed(self.step, end=self.step.step.end + 1)
        return [self.step]


def test_the_page_shows_what_the_server_does(browser, url, engine_client):
    browser.open(url)
    browser.wait_text("status", "live")
    browser.wait_text("chip", "echo")
    browser.wait_text("machine", "smollm2")
    wait_until(lambda: browser["t-batch"].text == "5")
    wait_until(lambda: browser["t-speed"].text.replace(",", "").isdigit())  # a hundred and more
    assert browser.count("svg .col") >= 1 and browser.count(".hit") + browser.count(".own") >= 5
    assert browser.count("#depth .bar") >= 2 and "%" in browser["depth"].text
    assert "ms" in browser["phases"].text
    assert "of Kmax" in browser["tree-note"].text
    assert engine_client.traced == [True]


def test_numbers_and_tree_are_those_of_the_step(browser):
    tree = RequestTree("cmpl-one", (-1, -1, 0, 0, 2, 4), (0, 0, 1, 1, 2, 3), (0, 2), 4)
    engine_client = StillHost()
    base = LiveWorld(requests=1).step()
    engine_client.step = changed(
        *(base,), batch_size=1, running=1, waiting=7, verified=6, accepted=2, committed=3, budget=8, knee=9, drafted=6,
        kv_used=0.25, reached_by_depth=(1, 1, 1, 0), accepted_by_depth=(1, 1, 0, 0), seconds=0.02, trees=(tree,),
        prefill_tokens=0,
    )  # fmt: skip
    engine_client.fallbacks = {"exception": 0, "nan": 4, "deadline": 3, "invalid": 0}
    with listening(make_app(engine_client)) as url:
        browser.open(url)
        browser.wait_text("t-mat", "3.00")
        wait_until(lambda: browser["t-nodes"].text == "6.00")
        assert "33% of nodes accepted" in browser["t-mat-sub"].text
        assert "budget 8.00, Kmax 9.00" in browser["t-nodes-sub"].text
        assert "7 waiting" in browser["t-batch-sub"].text
        assert browser["t-step"].text.startswith("20.0")
        assert browser["t-kv"].text == "25%" and browser["kv-meter"].get_attribute("aria-valuenow") == "25"
        assert browser.js("return [...document.querySelectorAll('#depth b')].map(e => e.textContent)") == [
            "100%", "100%", "0%", "–",
        ]  # fmt: skip
        assert (browser["f-total"].text, browser["f-nan"].text, browser["f-deadline"].text) == ("7", "4", "3")
        wait_until(lambda: browser.count(".col") > 0)
        hits, rings = browser.all(".col:first-child .hit", "cx"), browser.all(".col:first-child .own", "cx")
        assert len(hits) == 2 and hits[0] < hits[1] < rings[0] and len(rings) == 1
        dim = browser.js("return document.querySelector('.col .node').getAttribute('d').split('M').length - 1")
        assert dim == len(tree.parents) - len(tree.accepted)
        assert browser.count(".col:first-child .root") == 1
        said = browser.driver.find_element(By.CSS_SELECTOR, "#stage > svg").get_attribute("aria-label")
        assert "1 requests, 6 of 8 nodes verified, 2 accepted, 3 tokens" in said


def test_plain_steps_are_drawn_as_such(browser, url, engine_client):
    engine_client.controller = "none"
    browser.open(url)
    wait_until(lambda: "plain" in browser["stage"].text)
    browser.wait_text("t-mat-sub", "plain decoding")
    assert browser.count(".hit") == 0 and browser.count(".own") >= 5


def test_a_plain_step_without_trees_is_a_bare_column(browser):
    engine_client = StillHost()
    engine_client.step = changed(LiveWorld(requests=2, controller="none").step(), trees=())
    with listening(make_app(engine_client)) as url:
        browser.open(url)
        wait_until(lambda: browser.count(".col .bare") > 0)
        assert "plain" in browser["stage"].text and browser.count(".own") == 0


def test_a_controller_is_switched(browser, url, engine_client):
    browser.open(url)
    browser.wait_text("force", "echo")
    wait_until(lambda: browser.count("#specs option") > 5)
    browser.fill("spec", "chain:steps=2")
    assert "steps=" in browser["hint"].text
    browser["spec"].send_keys(Key.ENTER)
    browser.wait_text("switch-answer", "chain:steps=2 decides", "echo")
    browser.wait_text("force", "chain:steps=2")
    assert engine_client.controller == "chain:steps=2"


def test_a_refusal_is_shown_in_the_servers_words(browser, url, engine_client):
    browser.open(url)
    browser.fill("spec", "ppo")
    browser["switch"].find_element(By.TAG_NAME, "button").click()
    browser.wait_text("switch-answer", "the one in force stays")
    assert "wrong" in browser["switch-answer"].get_attribute("class") and engine_client.controller == "echo"


def test_an_experiment_is_started_watched_and_stopped(browser, url, engine_client):
    engine_client.speed = 8
    browser.open(url)
    browser.wait_text("status", "live")
    browser.fill("ab-control", "none")
    browser.fill("ab-treatment", "echo")
    browser.fill("ab-seconds", "0.2")
    browser["ab-form"].find_element(By.TAG_NAME, "button").click()
    browser.wait_text("ab-interval", "95 % interval")
    assert engine_client.switchback.options.block_seconds == 0.2
    browser.wait_text("chip", "none | echo")
    assert not browser["ab-form"].is_displayed() and browser.count(".arm") == 2
    assert browser.count("#ab-plot .mean") == browser.count("#ab-plot .span") == 1
    browser["ab-stop"].click()
    browser.wait_text("ab-note", "stopped")
    browser.wait_text("ab-answer", "stopped by hand")
    assert not browser["ab-stop"].is_displayed()
    ratio = engine_client.experiment.value["ratio"]
    browser.wait_text("ab-ratio", f"{ratio['estimate']:.3f}")


def test_the_key_opens_the_view_and_stays_in_the_tab(browser, engine_client):
    with listening(make_app(engine_client, Keys(admin=b"open sesame"))) as url:
        browser.open(url)
        wait_until(lambda: browser["gate"].is_displayed())
        browser["gate-key"].send_keys("wrong", Key.ENTER)
        browser.wait_text("gate-text", "not the admin key")
        browser["gate-key"].send_keys("open sesame", Key.ENTER)
        browser.wait_text("status", "live")
        browser.wait_text("chip", "echo")
        assert not browser["gate"].is_displayed()
        assert browser.js("return [localStorage.length, document.cookie, Object.values(sessionStorage).join()]") == [
            *(0, "", "open sesame"),
        ]
        asked = browser.js("return performance.getEntriesByType('resource').map(e => e.name).join()")
        assert "ui/session" in asked and "sesame" not in asked + browser.driver.current_url
        browser.driver.refresh()
        browser.wait_text("status", "live")


def test_a_lost_stream_is_opened_again(browser, url, engine_client):
    browser.open(url)
    browser.wait_text("status", "live")
    engine_client.alive = engine_client.ready = False
    wait_until(lambda: "offline" in browser["status"].text or "loading" in browser["status"].text)
    engine_client.alive = engine_client.ready = True
    browser.wait_text("status", "live")


def test_an_idle_server_is_shown_as_idle(browser, url, engine_client):
    browser.open(url)
    browser.wait_text("status", "live")
    engine_client.idle = True
    browser.wait_text("status", "idle")
    browser.wait_text("t-batch-sub", "in flight")
    assert browser["t-batch"].text == "0"


def test_what_the_server_says_is_text_never_markup(browser, url, engine_client):
    engine_client.controller = "<img src=x onerror=document.title='taken'>"
    browser.open(url)
    browser.wait_text("force", "<img src=x")
    assert browser.driver.title == "ECHO-RL live" and browser.count("#force *, #chip *") == 0


def test_pause_works_from_the_keyboard_and_holds_the_picture(browser, url):
    browser.open(url)
    browser.wait_text("status", "live")
    for _ in range(4):
        browser.driver.switch_to.active_element.send_keys(Key.TAB)
        if browser.driver.switch_to.active_element.get_attribute("id") == "pause":
            break
    browser.driver.switch_to.active_element.send_keys(Key.ENTER)
    assert browser["pause"].get_attribute("aria-pressed") == "true" and browser["pause"].text == "Resume"
    held = browser.count(".col"), browser["t-speed"].text
    wait_until(lambda: browser.js("return performance.now()") > 3000)
    assert (browser.count(".col"), browser["t-speed"].text) == held
    browser["pause"].click()
    wait_until(lambda: browser.count(".col") > held[0])


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
};
const texts = "h1, h2, p, dt, dd, label, button, summary, .legend li, svg text, .bar b, .bar span";
return [...document.querySelectorAll(texts)]
  .filter((e) => e.textContent.trim() && e.getBoundingClientRect().width > 1 && !e.disabled && !e.closest(".idle"))
  .map((e) => {
    const style = getComputedStyle(e);
    const [a, b] = [parse(e.ownerSVGElement ? style.fill : style.color), ground(e)].map(light).sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24;  // WCAG 2, 1.4.3
    return [e.tagName, e.textContent.trim().slice(0, 30), (a + 0.05) / (b + 0.05), large ? 3 : 4.5];
  }).filter(([, , ratio, least]) => ratio < least);
"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_text_has_contrast(browser, url, scheme):
    browser.open(url, scheme=scheme)
    wait_until(lambda: browser.count(".col") > 0)
    browser.wait_text("t-speed-sub", "prompt")
    assert browser.js(CONTRAST) == []
    backgrounds = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, backgrounds[4:-1].split(","))) > 600) == (scheme == "light")


@pytest.mark.parametrize("size", [WIDE, (1024, 768), PHONE, (320, 640)])
def test_nothing_is_wider_than_the_screen(browser, url, size):
    browser.open(url, size=size)
    wait_until(lambda: browser.count(".col") > 0)
    browser.wait_text("t-speed-sub", "prompt")
    assert browser.js("return document.documentElement.scrollWidth") <= size[0]
    if size is WIDE:
        assert browser.js("return document.documentElement.scrollHeight") <= size[1]


def test_every_field_has_a_name(browser, url):
    browser.open(url)
    fields = [
        node for node in browser.js("return [...document.querySelectorAll('input, button')]") if node.is_displayed()
    ]
    assert len(fields) >= 8
    assert [node.get_attribute("outerHTML") for node in fields if not node.accessible_name] == []
