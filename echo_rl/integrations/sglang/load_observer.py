"""Makes the `LoadView` that a controller is shown before a step from SGLang's queue, pool and batch.

SGLang prefills in steps of their own, so no prompt tokens ever share a decode step (`prefill_tokens` is 0).
Everything read here follows from requests that SGLang broadcasts to all its ranks, but only the leader's
view decides (`ranks`).
"""

from __future__ import annotations

from typing import Any

from echo_rl.contracts import LoadView


class LoadObserver:
    """Follows a scheduler's batches: `observe` is called before each is run, `load` before a decode step is planned."""

    def __init__(self) -> None:
        self._waiting = 0
        self._admitted = 0  # requests that began their prefill since the last decode step
        self._prefill: frozenset[str] = frozenset()  # of the last prefill batch: a long prompt comes in chunks
        self._load: LoadView | None = None

    def observe(self, scheduler: Any, batch: Any) -> bool:
        """Takes note of a batch; returns whether it is a decode step."""
        if batch.forward_mode.is_decode():
            self._observe_decode(scheduler, batch)
            return True
        if batch.forward_mode.is_extend():
            ids = frozenset(request.rid for request in batch.reqs)
            self._admitted += len(ids - self._prefill)
            self._prefill = ids
        return False

    def load(self, batch_size: int) -> LoadView:
        """Returns the view of the decode step observed last, for the batch that SGLang's worker counts."""
        last = self._load or LoadView(batch_size, 0, 0, 1.0, 0.0, 0)
        if last.batch_size != batch_size:
            return LoadView(batch_size, 0, last.waiting, last.mean_context, last.kv_used, 0)
        return last

    def _observe_decode(self, scheduler: Any, batch: Any) -> None:
        waiting, requests = len(scheduler.waiting_queue), batch.reqs
        arrived = max(0, waiting - self._waiting + self._admitted)
        context = sum(request.seqlen for request in requests) / max(1, len(requests))
        used = float(scheduler.pool_stats_observer.get_pool_stats().get_kv_token_stats()[1])
        self._load = LoadView(len(requests), 0, waiting, context, min(1.0, max(0.0, used)), 0, arrived)
        self._waiting, self._admitted, self._prefill = waiting, 0, frozenset()
