"""The picture of the live view in the README: a real server under load, an experiment running, in Chromium.

Needs ``chromium``, ``chromedriver`` and selenium (the ``dev`` extra). Writes ``results/ui.png``.
"""

from __future__ import annotations

import asyncio
import base64
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from PIL import Image

from benchmarks.common import CONSOLE, RESULTS, EngineOptions, main
from benchmarks.server import chromium
from benchmarks.server.client import name
from benchmarks.server.process import Server, post
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request
from echo_rl.experiments.targets.http.client import Client, chat_body
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.connection import Endpoint, run_async
from echo_rl.experiments.targets.http.drive import Ends, drive
from echo_rl.workloads.arrivals import Arrivals
from echo_rl.workloads.datasets import Prompt, load_prompts
from echo_rl.workloads.requests import Rotation

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

COLOURS = 256
SHOWN = """
const treated = document.body.innerText.includes("this block: treatment");
return treated ? document.querySelectorAll(".hit").length : null;
"""
"""How many accepted nodes the page shows; null while the control decides."""
SETTLED_SECONDS = 2.5
"""What the page shows of the control is gone by then."""


@dataclass(frozen=True)
class Args:
    """Take a picture of the live view."""

    out: Path = RESULTS / "ui.png"
    workload: str = "poisson:2.4"
    max_tokens: int = 160
    seconds: float = 45.0
    """Seconds of load before the picture is taken; some blocks of the experiment must be over."""
    control: str = "none"
    treatment: str = "echo"
    block_seconds: float = 4.0
    blocks: int = 30
    least_accepted: int = 12
    """Accepted nodes that the tree must show, under the treatment: the moment of the picture."""
    patience: float = 30.0
    """Seconds to wait for that moment."""
    size: tuple[int, int] = (1280, 800)
    scale: float = 1.5
    scheme: Literal["dark", "light"] = "dark"
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)


async def under_load(args: Args, url: str, prompts: list[Prompt], chrome: Chrome) -> bytes:
    """Starts the experiment and the load, opens the page, and returns its picture (PNG) after `seconds`."""
    experiment = {"control": args.control, "treatment": args.treatment, "block_seconds": args.block_seconds}
    endpoint = Endpoint(url)
    await post(endpoint, "/admin/ab", {**experiment, "blocks": args.blocks, "harm": 0.0})
    await endpoint.close()
    load = asyncio.create_task(send(args, url, prompts))
    try:
        await asyncio.to_thread(chrome.get, f"{url}/ui")
        await asyncio.wait((load,), timeout=args.seconds)
        if load.done():
            load.result()
        await asyncio.to_thread(wait_for_the_moment, args, chrome)
        shot = await asyncio.to_thread(chrome.execute_cdp_cmd, "Page.captureScreenshot", {"format": "png"})
    finally:
        load.cancel()
        with suppress(asyncio.CancelledError):
            await load
    return base64.b64decode(shot["data"])


def wait_for_the_moment(args: Args, chrome: Chrome) -> None:
    """Until the treatment has decided for a while and what it had accepted is in sight, or patience ends."""
    now = time.monotonic()
    end, since = now + args.patience, now
    while now < end:
        now, shown = time.monotonic(), chrome.execute_script(SHOWN)
        since = now if shown is None else since
        if shown is not None and now - since > SETTLED_SECONDS and shown >= args.least_accepted:
            return
        time.sleep(0.05)


async def send(args: Args, url: str, prompts: list[Prompt]) -> None:
    """The workload, until cancelled."""
    client = Client(url)
    (model, *_) = await client.models()
    config = LoadConfig((url,), (args.workload,), max_tokens=args.max_tokens, seed=args.seed)
    messages = {f"{prompt.suite}/{prompt.id}": prompt.messages for prompt in prompts}

    def body(request: Request) -> bytes:
        return chat_body(model, messages[name(request.id)], request, config.extra)

    arrivals = Arrivals(config.workload(args.workload, prompts), args.seed)
    try:
        await drive(
            client,
            arrivals,
            Rotation(config.requests_for(prompts), args.seed),
            body,
            Ends(seconds=args.seconds + args.patience + 60),
        )
    finally:
        await client.close()


def small(picture: bytes) -> bytes:
    """The same in `COLOURS` colours: a page of flat areas loses nothing that one sees."""
    out = BytesIO()
    with Image.open(BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            out, "PNG", optimize=True
        )
    return out.getvalue()


def script() -> None:
    args = tyro.cli(Args)
    prompts = load_prompts("all", seed=args.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(args.engine, Path(folder) / "server.log", ("--controller", args.treatment)) as server,
    ):
        url = server.ready()
        chrome = chromium.start(f"{folder}/chromium")
        try:
            chromium.dress(chrome, args.size, args.scale, prefers_color_scheme=args.scheme)
            picture = small(run_async(under_load(args, url, prompts, chrome)))
        finally:
            chrome.quit()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(picture)
    CONSOLE.print(f"{args.out} is written, {len(picture) / 1000:.0f} kB", highlight=False)


if __name__ == "__main__":
    main(script)
