"""Records a block of load as the client saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from echo_rl.workloads.records import RunRecord, pool

UNKNOWN = -1
"""The id of a token of which the client saw only the text."""


@dataclass(frozen=True)
class LoadRecord:
    """A run as the client saw it: without steps, tokens without ids, a failed request with its error."""

    run: RunRecord
    texts: tuple[str, ...]
    """The text that each request got."""
    chunks: int
    """Pieces of text that came."""
    retries: int
    """Requests sent again after a busy answer."""
    client_cpu_seconds: float
    """Processor time of this process."""

    @property
    def served(self) -> RunRecord:
        """The run without its failed requests: what they got does not count as output."""
        return replace(self.run, requests=tuple(r for r in self.run.requests if r.error is None))

    @property
    def texts_as_tokens(self) -> RunRecord:
        """The served requests with their characters in the place of tokens, to compare outputs."""
        pairs = zip(self.run.requests, self.texts, strict=True)
        requests = (replace(r, tokens=tuple(map(ord, text))) for r, text in pairs if r.error is None)
        return replace(self.run, requests=tuple(requests))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "run": self.run.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoadRecord:
        return cls(**{**data, "run": RunRecord.from_json(data["run"]), "texts": tuple(data["texts"])})


def together(records: Sequence[LoadRecord]) -> LoadRecord:
    """Blocks of one arm under one workload as if they were one."""
    return LoadRecord(
        run=pool([record.run for record in records]),
        texts=tuple(text for record in records for text in record.texts),
        chunks=sum(record.chunks for record in records),
        retries=sum(record.retries for record in records),
        client_cpu_seconds=sum(record.client_cpu_seconds for record in records),
    )
