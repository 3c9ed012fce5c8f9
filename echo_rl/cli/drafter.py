"""``echo-rl drafter``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig
from echo_rl.drafting.synthesize import SynthesizeConfig
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class Synthesize:
    """Let the target write its own training conversations; rerun it to go on where it stopped."""

    options: Annotated[SynthesizeConfig, tyro.conf.arg(name="")]
    concurrency: int = 32
    """Conversations in flight."""
    engine: EngineOptions = field(default_factory=lambda: EngineConfig(drafter=None))

    def run(self) -> int:
        from echo_rl.cli.live_drafting import EngineGenerator
        from echo_rl.drafting.synthesize import SMOLLM2_CHAT, synthesize
        from echo_rl.runtime.engine import Engine

        if self.engine.model != "smollm2":
            raise ConfigError("conversations are synthesised in SmolLM2's chat format only; leave out --model")
        if self.engine.drafter is not None:
            raise ConfigError("conversations are synthesised by plain decoding; leave out --drafter")
        engine = Engine.load(self.engine)
        complete = EngineGenerator(engine, self.concurrency)
        paths = synthesize(self.options, SMOLLM2_CHAT, lambda text: list(engine.tokenizer.encode(text)), complete)
        print(f"{len(paths)} shards in {self.options.out}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train an EAGLE-3 drafter on synthesised conversations; rerun it to go on where it stopped."""

    options: Annotated[TrainConfig, tyro.conf.arg(name="")]
    taps: tuple[int, ...] = (15, 25, 28)
    """Layers of the target (from 0) after which the drafter reads hidden states."""
    model: str = "smollm2"
    """The target, as for ``generate``."""

    def run(self) -> int:
        from echo_rl.cli.live_drafting import features_of, target_parts
        from echo_rl.drafting.features import cache_features
        from echo_rl.drafting.train import check, train
        from echo_rl.results import digest
        from echo_rl.runtime.architecture import read_architecture
        from echo_rl.runtime.weights import resolve_model

        folder: Path = resolve_model(self.model)
        parts, options = target_parts(folder), self.options
        check(options, self.taps, parts, read_architecture(folder).layers)
        model = digest(folder / "config.json", *sorted(folder.glob("*.safetensors")))
        cache_features(options.data, options.features, features_of(folder, self.taps), self.taps, model)
        run = train(options, parts)
        print(f"{options.out}: chain MAT {max(point['chain_mat'] for point in run.curve):.2f}")
        return 0


AnyCommand = Annotated[Synthesize, tyro.conf.subcommand("synthesize")] | Annotated[Train, tyro.conf.subcommand("train")]
