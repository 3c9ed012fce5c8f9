"""Holds the engine's settings: one frozen record, each default stated once, unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from echo_rl.errors import ConfigError

T = TypeVar("T")

MOST = 2**31 - 1
"""Largest count that a setting may give: block tables are int32."""
MOST_THREADS = 1_024


def from_mapping(record: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from a mapping. Raises `ConfigError` on an unknown key, naming the nearest known one."""
    known = [f.name for f in dataclasses.fields(record)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"{record.__name__} has no key '{key}'{hint}")
    return record(**values)


@dataclass(frozen=True)
class EngineConfig:
    """The settings by which a target and its drafter are loaded and run."""

    model: str = "smollm2"
    """``smollm2`` (the embedded default), the path of a Hugging Face folder (Llama, Qwen2, Qwen3), or the Hub's name of
    one, as ``HuggingFaceTB/SmolLM2-135M-Instruct``. A folder goes before a name of the same spelling."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hub; its main branch by default."""
    drafter: str | None = "default"
    """``default`` (the shipped one of the embedded model), the path or the Hub's name of an EAGLE-3 folder, or None."""
    drafter_revision: str | None = None
    """Branch, tag or commit of a drafter of the Hub; its main branch by default."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (the GPU of that number)."""
    dtype: str = "auto"
    """``auto`` (bf16 on CUDA and on CPUs that compute in it, else fp32), ``bfloat16``, ``float16`` or ``float32``."""
    block_size: int = 16
    """Tokens a KV block."""
    kv_tokens: int = 32_768
    """Capacity of the KV cache in tokens."""
    max_batch_size: int = 64
    """Requests served at once."""
    max_context: int = 2_048
    """Longest prompt plus output, in tokens; capped by the model's own limit."""
    prefill_chunk: int = 256
    """Most prompt tokens that share one step's forward pass."""
    max_nodes: int = 64
    """Most drafted nodes that one request may have verified in a step."""
    max_expanded: int = 96
    """Most nodes that the drafter expands for one request in a step."""
    drafter_weights: str = "auto"
    """``auto`` (eight bits where the processor multiplies them fast, see `echo_kernels.ops.Ops.pack_int8`) or
    ``model`` (`dtype`). Verification makes the output the same."""
    step: str = "auto"
    """``auto`` (device on CUDA with Triton, else eager), ``eager`` (the host decides level by level) or ``device``
    (decisions stay on the device, which is read once a step)."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_tokens", "max_batch_size", "max_context", "prefill_chunk"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 to {MOST}")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads is {self.threads}; give 0 (torch's choice) to {MOST_THREADS}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device is '{self.device}'; give auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", "bfloat16", "float32", "float16"):
            raise ConfigError(f"dtype is '{self.dtype}'; give auto, bfloat16, float16 or float32")
        if self.step not in ("auto", "eager", "device"):
            raise ConfigError(f"step is '{self.step}'; give auto, eager or device")
        if self.drafter_weights not in ("auto", "model"):
            raise ConfigError(f"drafter_weights is '{self.drafter_weights}'; give auto or model")
        if not 1 <= min(self.max_nodes, self.max_expanded) <= max(self.max_nodes, self.max_expanded) <= MOST:
            raise ConfigError(
                f"max_nodes and max_expanded must be 1 to {MOST}; use the controller 'none' not to speculate"
            )

    @property
    def model_source(self) -> str:
        """What results say the model is; with the commit where `revision` is pinned to one."""
        return _source(self.model, self.revision)

    @property
    def drafter_source(self) -> str:
        """What results say the drafter is, where it has a revision."""
        return _source(str(self.drafter), self.drafter_revision)

    @property
    def headroom(self) -> int:
        """KV positions a request may use beyond its committed tokens while a step is under way."""
        return max(self.max_nodes, self.max_expanded) + 1


def _source(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name
