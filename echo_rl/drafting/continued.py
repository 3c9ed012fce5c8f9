"""Starts a drafter from the weights of a trained one, also under another draft vocabulary."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from echo_rl.drafting.model import FEATURE_SCALE, DrafterNet
from echo_rl.errors import ConfigError
from echo_rl.runtime.drafters.folder import draft_to_target, load_drafter

RIDGE = 1e-2
FREE = ("draft_vocab", "max_positions")
"""Settings that may differ between the two drafters."""


@torch.no_grad()
def continue_from(net: DrafterNet, folder: str | Path, output: Tensor) -> None:
    """Overwrite `net`'s parameters by those of the EAGLE-3 folder.

    Tokens that the folder's drafter could not say get the rows of `lm_head` that its training would likely have given
    them: the target's own (`output` [vocab, hidden]) under the linear map that fits the rows it did train. Raises
    `WeightsError`, and `ConfigError` where it is built otherwise than this run's.
    """
    config, tensors = load_drafter(folder)
    fixed = [field.name for field in fields(config) if field.name not in FREE]
    others = [name for name in fixed if getattr(config, name) != getattr(net.config, name)]
    if others:
        theirs = ", ".join(f"{name} {getattr(config, name)}" for name in others)
        raise ConfigError(f"{folder} has {theirs}; train with the same, on features of its taps")
    own = dict(net.named_parameters())
    for name in own.keys() - {"lm_head.weight"}:
        own[name].copy_(tensors[name])
    own["fc.weight"].div_(FEATURE_SCALE)
    known, trained = draft_to_target(tensors["d2t"]), tensors["lm_head.weight"].float()
    own["lm_head.weight"].copy_(_output_rows(trained, known, net.vocabulary, output.float()))


def _output_rows(trained: Tensor, known: Tensor, wanted: Tensor, output: Tensor) -> Tensor:
    """[W, hidden] for the target ids `wanted`, from the rows trained [K, hidden] for the ids `known`."""
    given = output[known]
    size = given.square().sum(0).mean()
    mapped = torch.linalg.solve(given.T @ given + torch.eye(given.shape[1]) * size * RIDGE, given.T @ trained)
    rows = output @ mapped
    rows[known] = trained
    return rows[wanted]
