"""``echo-rl drafter``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from echo_rl.config import EngineConfig
from echo_rl.drafting.synthesize import SynthesizeConfig
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets import FileOptions


@dataclass(frozen=True)
class TargetOptions:
    """Settings of the target that writes the conversations, by plain decoding."""

    model: str = EngineConfig.model
    """The target, as for ``generate``; another than the embedded one needs ``--prompts``."""
    device: str = EngineConfig.device
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (the GPU of that number)."""
    dtype: str = EngineConfig.dtype
    """``auto``, ``bfloat16``, ``float16`` or ``float32``."""
    kv_tokens: int = EngineConfig.kv_tokens
    """Capacity of the KV cache in tokens."""
    max_batch_size: int = EngineConfig.max_batch_size
    """Conversations served at once."""
    max_context: int = EngineConfig.max_context
    """Longest conversation, in tokens."""
    threads: int = EngineConfig.threads
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Synthesize:
    """Let the target write its own training conversations, or only the answers to prompts of yours (``--prompts``);
    rerun it to go on where it stopped.

    Of a conversation every turn of the user is answered, after the turns before it as they were recorded; where no
    answer was recorded, after the target's own. ``synthesis.json`` names the files by their sha256.
    """

    options: Annotated[SynthesizeConfig, tyro.conf.arg(name="")]
    files: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    concurrency: int = 32
    """Conversations in flight."""
    target: Annotated[TargetOptions, tyro.conf.arg(name="")] = TargetOptions()

    def run(self) -> int:
        from echo_rl.drafting.live import answer_on, synthesize_on
        from echo_rl.runtime.engine import Engine

        if not self.files.prompts and self.target.model != EngineConfig.model:
            raise ConfigError("only the embedded target can open questions of its own; give --prompts FILE to answer")
        engine = Engine.load(EngineConfig(drafter=None, **asdict(self.target)))
        if not self.files.prompts:
            print(f"{len(synthesize_on(engine, self.options, self.concurrency))} shards in {self.options.out}")
            return 0
        done = answer_on(engine, self.options, self.files, self.concurrency)
        for line in done.notes:
            print(line)
        print(f"{done.conversations} conversations, {len(done.shards)} shards in {self.options.out}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train an EAGLE-3 drafter on synthesised conversations; rerun it to go on where it stopped."""

    options: Annotated[TrainConfig, tyro.conf.arg(name="")]
    taps: tuple[int, ...] = (15, 25, 28)
    """Layers of the target (from 0) after which the drafter reads hidden states."""
    model: str = "smollm2"
    """The target, as for ``generate``."""
    revision: str | None = None
    """Branch, tag or commit of a target of the Hub; its main branch by default."""

    def run(self) -> int:
        from echo_rl.drafting.live import train_for
        from echo_rl.runtime.models.locate import resolve_model

        run = train_for(resolve_model(self.model, self.revision), self.options, self.taps)
        print(f"{self.options.out}: chain MAT {max(point['chain_mat'] for point in run.curve):.2f}")
        return 0


AnyCommand = Annotated[Synthesize, tyro.conf.subcommand("synthesize")] | Annotated[Train, tyro.conf.subcommand("train")]
