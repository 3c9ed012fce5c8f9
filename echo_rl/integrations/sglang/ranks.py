"""One decision for all ranks of a tensor-parallel group.

Every rank must run the same shape or their collectives no longer match. Decisions depend on measured
seconds and on floating-point arithmetic of the host, which differ between ranks, so they are never taken
twice: rank 0 decides, and one small broadcast over the group's CPU backend tells the others. All ranks call
in the same order, because SGLang's scheduler runs the same batches on each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.steering import Decision


class SingleRank:
    """The only rank of a process that runs alone."""

    leads = True

    def agree(self, decide: Callable[[], Decision]) -> Decision:
        """Returns the leader's decision on every rank."""
        return decide()

    def require_same(self, text: str) -> None:
        """Raises `ConfigError` on every rank unless all hold the same text."""
        del text  # nobody to differ from


class RankGroup:
    """The ranks of a `torch.distributed` group with a CPU backend; `levels` bounds a decision's gates.

    A message is [2 + levels] float64: whether the leader could decide, the shape, the gates.
    """

    def __init__(self, group: Any, levels: int) -> None:
        import torch.distributed as dist

        self._group, self._levels = group, levels
        self._source = dist.get_global_rank(group, 0)
        self.leads = dist.get_rank(group) == 0

    def agree(self, decide: Callable[[], Decision]) -> Decision:
        """Returns the leader's decision. An error of the leader is raised there, a `RuntimeError` on the others."""
        import torch
        import torch.distributed as dist

        message, error = torch.zeros(2 + self._levels, dtype=torch.float64), None
        if self.leads:
            try:
                message = self._encode(decide())
            except Exception as raised:  # the others wait for a message, whatever happened here
                error = raised
        dist.broadcast(message, self._source, group=self._group)
        if error is not None:
            raise error
        if not message[0]:
            raise RuntimeError("the leading rank could not decide a step; see its log")
        values = message.tolist()
        return Decision(int(values[1]), tuple(values[2:]))

    def require_same(self, text: str) -> None:
        import torch.distributed as dist

        digest = hashlib.sha256(text.encode()).hexdigest()
        digests: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(digests, digest, group=self._group)
        if len(set(digests)) > 1:
            raise ConfigError("the ranks read different configurations; give every machine the same file and package")

    def _encode(self, decision: Decision) -> Any:
        import torch

        gates = (*decision.gates, *[0.0] * (self._levels - len(decision.gates)))
        return torch.tensor([1.0, float(decision.shape), *gates], dtype=torch.float64)


Ranks = SingleRank | RankGroup
