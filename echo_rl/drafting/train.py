"""Trains a drafter from cached features: ``train(config, parts)`` writes an EAGLE-3 folder.

Matrices are trained with Muon, norms and the output layer with AdamW; masters are float32, compute is in the
config's precision. A run is a pure function of its config, data and `TargetParts`: interrupted and resumed, it
ends with the same weights. One that is made longer goes on from where it ended, on the rates of the longer schedule.
Never runs the target.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from echo_rl.drafting.batches import Batch, Document, collate, documents, plan_epoch
from echo_rl.drafting.continued import continue_from
from echo_rl.drafting.conversations import (
    Conversations,
    check_conversations,
    choose_vocabulary,
    shards,
    synthesis,
    token_counts,
)
from echo_rl.drafting.evaluate import Acceptance, measure
from echo_rl.drafting.features import FeatureShard, features_claim, open_features
from echo_rl.drafting.loss import Columns, soft_cross_entropy, soft_labels
from echo_rl.drafting.model import DrafterNet, Rotary, Unroll
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts, warm_start
from echo_rl.errors import ConfigError
from echo_rl.runtime.drafters.folder import DrafterConfig, save_drafter
from echo_rl.utils.files import replacing
from echo_rl.utils.result_store import differing, digest

STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Corpus:
    """Shards, their documents split in two, and the draft vocabulary."""

    shards: list[FeatureShard]
    features: Mapping[str, Any]  # taps and model, as `features_claim` has them
    training: list[Document]
    validation: list[Document]
    vocabulary: Tensor  # [draft_vocab] ascending target ids
    to_draft: Tensor  # [vocab] draft id or -1
    coverage: float

    @property
    def identity(self) -> dict[str, Any]:
        """Digest of each shard, by name, and what the features are of, in JSON's types.

        With the config it settles the draft vocabulary and which documents are held out.
        """
        return {"shards": {shard.name: shard.conversations.digest for shard in self.shards}, **self.features}

    @classmethod
    def open(cls, config: TrainConfig, vocab: int) -> Corpus:
        shards = open_features(config.data, config.features)
        check_conversations((shard.conversations for shard in shards), vocab, config.max_positions)
        found = documents(shards)
        greedy = [item for item in found if shards[item.shard].conversations.greedy[item.index]]
        held = set(random.Random(config.seed).sample(greedy, min(config.validation, len(greedy) // 2)))
        training = [item for item in found if item not in held]
        if not training or not held:
            raise ConfigError(f"{len(found)} usable conversations are too few; generate more")
        ids, coverage = choose_vocabulary(token_counts([s.conversations for s in shards], vocab), config.draft_vocab)
        to_draft = torch.full((vocab,), -1).index_copy(0, ids, torch.arange(len(ids)))
        validation = sorted(held, key=lambda d: (d.shard, d.index))
        return cls(shards, features_claim(config.features), training, validation, ids, to_draft, coverage)


def make_optimizers(net: DrafterNet, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for norms and the output layer."""
    named = dict(net.named_parameters())
    output = named.pop("lm_head.weight")
    matrices = [value for value in named.values() if value.ndim == 2]
    norms = [value for value in named.values() if value.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": norms, "lr": config.lr}, {"params": [output], "lr": config.output_lr}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def batch_loss(
    net: DrafterNet, batch: Batch, embedding: Tensor, output: Tensor, corpus: Corpus, config: TrainConfig, update: int
) -> Tensor:
    """Soft cross-entropy of every level, per row. Rows whose label the drafter cannot say have no weight.

    embedding [vocab, hidden] and output [draft_vocab, hidden] are the target's, in the compute precision.
    """
    levels = config.levels_at(update)
    labelled = [batch.labels(level, corpus.to_draft) for level in range(levels)]
    needed = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for index, _, exists in labelled:
        needed[index[exists] - 1] = True  # the position before a token holds the target's distribution of it
    place = needed.cumsum(0) - 1
    soft = soft_labels(batch.final[needed].to(output.dtype), output, config.hard_share)
    columns = Columns.choose(soft, config.columns, torch.Generator().manual_seed(config.seed * 1_000_003 + update))
    soft = columns.restrict(soft)
    weights, rotary = net.weights(embedding.dtype), Rotary.of(net.config, embedding.dtype)
    own_output = weights["lm_head.weight"][columns.ids]
    total = torch.zeros(())
    unroll = Unroll(net.config, weights, embedding, rotary, batch)
    for level, (hidden, (index, draft, exists)) in enumerate(zip(unroll.steps(levels), labelled, strict=True)):
        weight = (exists & (draft >= 0)).float() * config.level_decay**level / len(batch.rows)
        at_output = own_output if level < config.output_levels else own_output.detach()
        rows = place[index - 1].clamp_min(0)  # rows without a label have weight 0
        total = total + soft_cross_entropy(hidden, at_output, soft[rows], weight, columns.correction)
    return total


class TrainingRun:
    """The state of one training run: everything that a resume needs."""

    def __init__(self, config: TrainConfig, parts: TargetParts) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.embedding = parts.embedding.to(getattr(torch, config.precision))
        self.corpus = Corpus.open(config, len(parts.embedding))
        self.output = parts.output[self.corpus.vocabulary].to(self.embedding.dtype)
        taps = tuple(self.corpus.features["taps"])
        self.net = DrafterNet(drafter_config(config, taps, parts), self.corpus.vocabulary)
        self.optimizers = make_optimizers(self.net, config)
        self.update, self.epoch, self.batch_in_epoch, self.seconds = 0, 0, 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.started_from: str | None = None
        self.state_path = Path(config.out) / STATE_FILE
        if self.state_path.exists():
            self._restore()
        elif config.start is not None:
            continue_from(self.net, config.start, parts.output)
            self.started_from = digest(*sorted(Path(config.start).glob("*.safetensors")))
        elif config.regression_rows:
            warm_start(
                self.net, self.corpus.shards, self.corpus.training, parts,
                limit=config.regression_rows, self_heads=config.self_heads, seed=config.seed,
            )  # fmt: skip

    def _restore(self) -> None:
        try:
            state = torch.load(self.state_path, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(
                f"{self.state_path} is damaged; delete it to train anew, with --start and another out folder to go on "
                "from the best drafter so far"
            ) from error
        ignored = ("out", "updates", "evaluate_every", "checkpoint_every")
        changed = sorted(set(differing(state["config"], asdict(self.config))) - set(ignored))
        if changed:
            raise ConfigError(
                f"{self.state_path} was trained with another {', '.join(changed)}; use another out folder"
            )
        if state.get("data") != self.corpus.identity:
            raise ConfigError(
                f"{self.state_path} was trained on other conversations or features than {self.config.data} and "
                f"{self.config.features} hold now; give another out folder, and --start {self.config.out} to go on "
                "from its drafter"
            )
        self.net.load_state_dict(state["net"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.update, self.epoch, self.batch_in_epoch = state["update"], state["epoch"], state["batch_in_epoch"]
        self.seconds, self.curve, self.started_from = state["seconds"], state["curve"], state["started_from"]

    def save_state(self) -> None:
        state = {
            "config": asdict(self.config), "data": self.corpus.identity, "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "update": self.update, "epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch,
            "seconds": self.seconds, "curve": self.curve, "started_from": self.started_from,
        }  # fmt: skip
        with replacing(self.state_path) as part:
            torch.save(state, part)

    def batches(self) -> Iterator[Batch]:
        """Endless batches, from where the run stands; epoch e's order depends on the seed and e alone."""
        while True:
            rng = random.Random(self.config.seed * 7919 + self.epoch)
            plan = list(plan_epoch(self.corpus.training, self.config.batch_tokens, rng))
            while self.batch_in_epoch < len(plan):
                yield collate(self.corpus.shards, plan[self.batch_in_epoch])
            self.epoch, self.batch_in_epoch = self.epoch + 1, 0

    def step(self, batch: Batch) -> float:
        """Take one update and return the loss."""
        began = time.perf_counter()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.config.rate_at(self.update)
            optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(self.net, batch, self.embedding, self.output, self.corpus, self.config, self.update)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.update, self.batch_in_epoch = self.update + 1, self.batch_in_epoch + 1
        self.seconds += time.perf_counter() - began
        return float(loss.detach())

    def measure(self) -> Acceptance:
        return measure(self.net, self.corpus.shards, self.corpus.validation, self.embedding, self.corpus.to_draft)


def drafter_config(config: TrainConfig, taps: tuple[int, ...], parts: TargetParts) -> DrafterConfig:
    """The drafter's sizes: the target's width and heads, the config's vocabulary, kv heads and MLP."""
    hidden = parts.embedding.shape[1]
    return DrafterConfig(
        hidden=hidden, target_hidden=hidden, target_vocab=len(parts.embedding), taps=taps,
        heads=parts.q.shape[0] // parts.head_dim, kv_heads=config.kv_heads, head_dim=parts.head_dim,
        intermediate=config.intermediate, draft_vocab=config.draft_vocab,
        rope_theta=config.rope_theta, eps=config.eps, max_positions=config.max_positions,
    )  # fmt: skip


def check(config: TrainConfig, taps: tuple[int, ...], parts: TargetParts, layers: int) -> None:
    """Refuse what training would stumble over, before hours go into features. `layers` are the target's.

    Raises `ConfigError`; `WeightsError` for sizes or taps that no drafter of this target can have.
    """
    vocab, hidden = parts.embedding.shape
    drafter_config(config, taps, parts).check_target(hidden=hidden, vocab=vocab, layers=layers)
    if config.start is None and config.regression_rows:
        check_heads(config, parts)
    check_conversations(map(Conversations.load, shards(config.data)), vocab, config.max_positions)


def check_heads(config: TrainConfig, parts: TargetParts) -> None:
    """Raises `ConfigError` where a warm start can't make the drafter's heads of the target's."""
    theirs = parts.k.shape[0] // parts.head_dim
    if config.kv_heads % theirs:
        raise ConfigError(
            f"kv_heads is {config.kv_heads}, but a warm start repeats the target's {theirs}; give a multiple of "
            f"{theirs}, or regression_rows=0 to start from nothing"
        )


def write_manifest(run: TrainingRun, best: dict[str, Any]) -> None:
    """Write the checkpoint's manifest beside it: config, data, curve and metrics."""
    training: Sequence[Document] = run.corpus.training
    manifest = {
        "config": {k: v for k, v in asdict(run.config).items() if k not in ("data", "features", "out", "start")},
        "data": {
            "conversations": len(training), "tokens": sum(item.length for item in training),
            "rows": sum(item.rows for item in training), "validation_conversations": len(run.corpus.validation),
            "vocabulary_coverage": round(run.corpus.coverage, 4), "synthesis": synthesis(run.config.data),
        },
        "started_from": run.started_from,
        "torch": torch.__version__, "seconds": round(run.seconds), "best": best, "curve": run.curve,
    }  # fmt: skip
    with replacing(Path(run.config.out) / "manifest.json") as part:
        part.write_text(json.dumps(manifest, indent=1) + "\n")


def _evaluate(run: TrainingRun, writer: SummaryWriter) -> None:
    """Validate, keep the best checkpoint, and save the state."""
    found = run.measure()
    run.curve.append({"update": run.update, "seconds": round(run.seconds), **found.to_json()})
    writer.add_scalar("validation/chain_mat", found.chain_mat, run.update)
    for level, (top1, top8) in enumerate(zip(found.top1, found.top8, strict=True)):
        writer.add_scalar(f"validation/top1_level{level}", top1, run.update)
        writer.add_scalar(f"validation/top8_level{level}", top8, run.update)
    best = max(run.curve, key=lambda point: point["chain_mat"])
    if best is run.curve[-1]:
        save_drafter(run.config.out, run.net.config, run.net.export())
    write_manifest(run, best)
    run.save_state()


def train(config: TrainConfig, parts: TargetParts) -> TrainingRun:
    """Train until `config.updates`, or go on from the state in `config.out`. Returns the finished run."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    run = TrainingRun(config, parts)
    with SummaryWriter(str(Path(config.out) / "tensorboard")) as writer, Progress() as progress:
        task = progress.add_task("updates", total=config.updates, completed=run.update)
        if not run.curve:
            _evaluate(run, writer)
        batches = run.batches()
        while run.update < config.updates:
            loss = run.step(next(batches))
            writer.add_scalar("train/loss", loss, run.update)
            if run.update % config.evaluate_every == 0 or run.update == config.updates:
                _evaluate(run, writer)
            elif run.update % config.checkpoint_every == 0:
                run.save_state()
            mat = run.curve[-1]["chain_mat"]
            progress.update(task, completed=run.update, description=f"loss {loss:.3f}, chain MAT {mat:.2f}")
    return run
