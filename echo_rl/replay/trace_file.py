"""Traces on disk: one safetensors file, ragged levels, log-probabilities in the dtype they are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from echo_rl.contracts import SamplingParams
from echo_rl.errors import TraceError
from echo_rl.replay.levels import Level
from echo_rl.replay.response import Response
from echo_rl.utils.files import replacing

KIND = "echo-rl trace"
TRACE_VERSION = 1


def write_trace(
    path: Path, responses: Sequence[Response], levels: Sequence[Level], provenance: str, half: bool
) -> None:
    """Write the file; it is replaced whole or not at all."""
    body = {"responses": [asdict(r) for r in responses], "provenance": provenance}
    header = {"kind": KIND, "version": str(TRACE_VERSION), "body": json.dumps(body)}
    tensors: dict[str, NDArray[Any]] = {}
    for d, level in enumerate(levels):
        used = level.parents >= 0 if d else np.ones(level.parents.shape, dtype=bool)  # [P, F] what isn't padding
        tensors |= {
            f"{d}.counts": used.sum(1).astype(np.uint8),
            f"{d}.parents": level.parents[used].astype(np.int16),
            f"{d}.scores": level.scores[used].astype(np.float16 if half else np.float32),
            f"{d}.path": level.path.astype(np.int16),
        }
    with replacing(path) as part:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, part, metadata=header)


def read_trace(path: Path) -> tuple[tuple[Response, ...], tuple[Level, ...], str]:
    """The responses, levels and provenance of a file.

    Raises `TraceError` where it is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot read the trace {path} ({error}); record it with `echo-rl record`") from error
    if header.get("kind") != KIND:
        raise TraceError(f"{path} is not a trace; record one with `echo-rl record`")
    if header.get("version") != str(TRACE_VERSION):
        raise TraceError(
            f"{path} has version {header.get('version')}, this release reads {TRACE_VERSION}; record again"
        )
    try:
        body = json.loads(header["body"])
        levels = tuple(_level(tensors, d) for d in range(len(tensors) // 4))
        return tuple(map(_response, body["responses"])), levels, body["provenance"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TraceError(f"the trace {path} is damaged ({error}); record it again") from error


def _level(tensors: dict[str, NDArray[Any]], depth: int) -> Level:
    counts, scores = tensors[f"{depth}.counts"].astype(np.int64), tensors[f"{depth}.scores"]
    used = np.arange(int(counts.max(initial=1))) < counts[:, None]
    parents = np.full(used.shape, -1, dtype=np.int64)
    full = np.full((*used.shape, scores.shape[1]), -np.inf, dtype=np.float32)
    parents[used], full[used] = tensors[f"{depth}.parents"], scores
    return Level(full, parents, tensors[f"{depth}.path"].astype(np.int64))


def _response(row: dict[str, Any]) -> Response:
    params = SamplingParams(**row["params"] | {"stop": tuple(row["params"]["stop"])})
    return Response(**row | {"prompt": tuple(row["prompt"]), "tokens": tuple(row["tokens"]), "params": params})
