"""Starts a drafter from the weights of a trained one, also under another draft vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from echo_rl.drafting.model import FEATURE_SCALE, DrafterNet
from echo_rl.errors import ConfigError
from echo_rl.runtime.drafter_model import draft_to_target, load_drafter

RIDGE = 1e-2


@torch.no_grad()
def continue_from(net: DrafterNet, folder: str | Path, output: Tensor) -> None:
    """Overwrite `net`'s parameters by those of the EAGLE-3 folder.

    Tokens that the folder's drafter could not say get the rows of `lm_head` that its training would likely have given
    them: the target's own (`output` [vocab, hidden]) under the linear map that fits the rows it did train. Raises
    `WeightsError`, and `ConfigError` where the sizes are not this run's.
    """
    config, tensors = load_drafter(folder)
    if config.taps != net.config.taps:
        raise ConfigError(f"{folder} reads layers {list(config.taps)}; cache features of those, in another folder")
    known = draft_to_target(tensors["d2t"])
    own = dict(net.named_parameters())
    for name, parameter in own.items():
        value = tensors[name].float()
        if name == "lm_head.weight":
            value = _output_rows(value, known, net.vocabulary, output.float())
        if value.shape != parameter.shape:
            raise ConfigError(
                f"{folder} has a {name} of {list(value.shape)}, this run one of {list(parameter.shape)}; "
                "train in its sizes"
            )
        parameter.copy_(value)
    own["fc.weight"].div_(FEATURE_SCALE)


def _output_rows(trained: Tensor, known: Tensor, wanted: Tensor, output: Tensor) -> Tensor:
    """[W, hidden] for the target ids `wanted`, from the rows trained [K, hidden] for the ids `known`."""
    given = output[known]
    size = given.square().sum(0).mean()
    mapped = torch.linalg.solve(given.T @ given + torch.eye(given.shape[1]) * size * RIDGE, given.T @ trained)
    rows = output @ mapped
    rows[known] = trained
    return rows[wanted]
