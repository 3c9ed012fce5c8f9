"""What a controller may know of an SGLang scheduler before a step: `LoadView` from its queue, pool and batch.

SGLang prefills in steps of their own, so no prompt tokens ever share a decode step (`prefill_tokens` is 0).
Everything read here follows from requests that SGLang broadcasts to all its ranks, but only the leader's
view decides (`ranks`).
"""

from __future__ import annotations

from typing import Any

from echo_rl.contracts import LoadView


class LoadObserver:
    """Follows a scheduler's batches. `see` before each is run, `load` for the decode step that is about to."""

    def __init__(self) -> None:
        self._waiting = 0
        self._admitted = 0  # requests that began their prefill since the last decode step
        self._prefill: frozenset[str] = frozenset()  # of the last prefill batch: a long prompt comes in chunks
        self._load: LoadView | None = None

    def see(self, scheduler: Any, batch: Any) -> bool:
        """Whether the batch is a decode step."""
        if batch.forward_mode.is_decode():
            self._see_decode(scheduler, batch)
            return True
        if batch.forward_mode.is_extend():
            ids = frozenset(request.rid for request in batch.reqs)
            self._admitted += len(ids - self._prefill)
            self._prefill = ids
        return False

    def load(self, batch_size: int) -> LoadView:
        """The view of the decode step seen last, for the batch that SGLang's worker counts."""
        seen = self._load
        if seen is None or seen.batch_size != batch_size:
            seen = seen or LoadView(batch_size, 0, 0, 1.0, 0.0, 0)
            return LoadView(batch_size, 0, seen.waiting, seen.mean_context, seen.kv_used, 0)
        return seen

    def _see_decode(self, scheduler: Any, batch: Any) -> None:
        waiting, requests = len(scheduler.waiting_queue), batch.reqs
        arrived = max(0, waiting - self._waiting + self._admitted)
        context = sum(request.seqlen for request in requests) / max(1, len(requests))
        used = float(scheduler.pool_stats_observer.get_pool_stats().get_kv_token_stats()[1])
        self._load = LoadView(len(requests), 0, waiting, context, min(1.0, max(0.0, used)), 0, arrived)
        self._waiting, self._admitted, self._prefill = waiting, 0, frozenset()
