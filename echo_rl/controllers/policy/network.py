"""Holds a learned policy as plain arrays: a small MLP from an observation to one choice a knob, and its folder.

A folder holds ``model.safetensors`` and ``manifest.json`` (what the policy is bound to, how it was
trained, the weights' sha256). Needs numpy and safetensors alone.

Tensors: ``layer.I.weight`` [out, in] and ``layer.I.bias`` [out], I from 0; the last layer's outputs are
the logits of all knobs, one knob after the other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from echo_rl.codec import CODEC_VERSION, FEATURES, ActionTable
from echo_rl.errors import PolicyError
from echo_rl.utils.files import replacing

KIND = "echo-rl policy"
POLICY_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"

Array = NDArray[np.float32]
Activation = Literal["tanh", "relu"]
AGAIN = "train again with this release (`echo-rl train`)"


@dataclass(frozen=True)
class Layer:
    weight: Array  # [out, in]
    bias: Array  # [out]


@dataclass(frozen=True)
class Policy:
    """Layers with an activation between them. Raises `PolicyError` where they do not fit the codec or the table."""

    layers: tuple[Layer, ...]
    table: ActionTable = field(default_factory=ActionTable)
    repeat: int = 1
    """Serving steps for which a decision stands."""
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        sizes = [len(FEATURES), *(len(layer.bias) for layer in self.layers)]
        shapes = [layer.weight.shape for layer in self.layers]
        if shapes != [(rows, columns) for columns, rows in pairwise(sizes)]:
            raise PolicyError(f"layers of shapes {shapes} do not follow from {len(FEATURES)} features; {AGAIN}")
        if sizes[-1] != sum(self.table.sizes):
            raise PolicyError(f"the policy says {sizes[-1]} logits, its table needs {sum(self.table.sizes)}; {AGAIN}")
        if self.repeat < 1 or self.activation not in get_args(Activation):
            raise PolicyError(f"policy repeat is {self.repeat}, activation {self.activation!r}; {AGAIN}")

    @property
    def hidden(self) -> tuple[int, ...]:
        return tuple(len(layer.bias) for layer in self.layers[:-1])

    @property
    def finite(self) -> bool:
        return all(bool(np.isfinite(a).all()) for layer in self.layers for a in (layer.weight, layer.bias))

    def logits(self, observation: Array) -> Array:
        """[..., len(FEATURES)] -> [..., sum(table.sizes)]."""
        squash = _ACTIVATIONS[self.activation]
        x = observation
        for layer in self.layers[:-1]:
            x = squash(x @ layer.weight.T + layer.bias)
        last = self.layers[-1]
        result: Array = x @ last.weight.T + last.bias
        return result

    def act(self, observation: Array, generator: np.random.Generator | None = None) -> tuple[int, ...]:
        """The likeliest action at one observation, or one drawn by the generator.

        Raises `PolicyError` where a logit is not finite: there is no likeliest action then.
        """
        logits = self.logits(observation)
        if generator is not None:
            logits = logits + generator.gumbel(size=logits.shape).astype(np.float32)
        values: list[float] = logits.tolist()
        if not math.isfinite(sum(values)):
            raise PolicyError("the policy's logits are not finite")
        ends = list(accumulate(self.table.sizes))
        knobs = (values[begin:end] for begin, end in zip((0, *ends), ends, strict=False))
        return tuple(knob.index(max(knob)) for knob in knobs)

    def save(self, folder: str | Path, manifest: Mapping[str, Any]) -> None:
        """Write the folder; `manifest` adds what is known of the training (``trained``, ``metrics``, ``commit``, ...).

        Each file is replaced at once. A folder that was cut short between the two is refused by `load`.
        """
        folder = Path(folder)
        weights = save(self._tensors())
        known = {
            "kind": KIND,
            "version": POLICY_VERSION,
            **bound(self.table),
            "hidden": list(self.hidden),
            "activation": self.activation,
            "repeat": self.repeat,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        text = json.dumps({**known, **{k: v for k, v in manifest.items() if k not in known}}, indent=1) + "\n"
        for name, content in ((WEIGHTS_FILE, weights), (MANIFEST_FILE, text.encode())):
            with replacing(folder / name) as part:
                part.write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path, table: ActionTable | None = None) -> Policy:
        """Read a folder; `table` is what its actions must mean (None: this release's default table).

        Raises `PolicyError`, naming the remedy, where a file is missing or damaged, where the policy was
        made for another codec, other features or another table, and where a weight is not finite.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        table = table or ActionTable()
        _require_bound(folder, manifest, table)
        tensors = _read_weights(folder, manifest)
        try:
            count = len(manifest["hidden"]) + 1
            layers = tuple(Layer(tensors[f"layer.{i}.weight"], tensors[f"layer.{i}.bias"]) for i in range(count))
            policy = cls(layers, table, int(manifest["repeat"]), manifest["activation"])
        except PolicyError as error:
            raise PolicyError(f"{folder}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError(f"{folder} does not hold what its manifest says ({error}); {AGAIN}") from error
        if list(policy.hidden) != manifest["hidden"]:
            raise PolicyError(
                f"{folder} has layers of {policy.hidden}, its manifest says {manifest['hidden']}; {AGAIN}"
            )
        if not policy.finite:
            raise PolicyError(f"{folder} has weights that are not finite: its training diverged; {AGAIN}")
        return policy

    def _tensors(self) -> dict[str, Array]:
        names = ("weight", "bias")
        parts = ((f"layer.{i}.{name}", getattr(layer, name)) for i, layer in enumerate(self.layers) for name in names)
        return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in parts}


def read_manifest(folder: Path) -> dict[str, Any]:
    """A policy folder's manifest. Raises `PolicyError`."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise PolicyError(f"no policy at {folder} ({MANIFEST_FILE}: {error.strerror}); {_GIVE}") from error
    except ValueError as error:
        raise PolicyError(f"{path} is damaged ({error}); copy the folder again, or {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise PolicyError(f"{path} is not the manifest of a policy; {_GIVE}")
    if manifest.get("version") != POLICY_VERSION:
        raise PolicyError(f"{path} has format {manifest.get('version')}, this release reads {POLICY_VERSION}; {AGAIN}")
    return manifest


def _read_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Array]:
    path = folder / WEIGHTS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read {path} ({error.strerror}); copy the folder again, or {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
        raise PolicyError(f"{path} is damaged: not the weights that its manifest names; copy it again, or {AGAIN}")
    try:
        tensors: dict[str, Array] = load(content)
    except SafetensorError as error:
        raise PolicyError(f"{path} is not a safetensors file ({error}); copy it again, or {AGAIN}") from error
    return tensors


def bound(table: ActionTable) -> dict[str, Any]:
    """The meaning of a policy's inputs and outputs, as JSON."""
    values = {name: list(column) for name, column in asdict(table).items()}
    return {"codec_version": CODEC_VERSION, "features": [name for name, *_ in FEATURES], "table": values}


def _require_bound(folder: Path, manifest: Mapping[str, Any], table: ActionTable) -> None:
    """Raises `PolicyError` where the policy speaks another language than this release."""
    wanted = bound(table)
    version, features = manifest.get("codec_version"), manifest.get("features")
    if version != CODEC_VERSION:
        raise PolicyError(f"{folder} was made for codec version {version}, this release has {CODEC_VERSION}; {AGAIN}")
    if not isinstance(features, Sequence) or len(features) != len(FEATURES):
        count = len(features) if isinstance(features, Sequence) else "no"
        raise PolicyError(f"{folder} was made for {count} features, this release has {len(FEATURES)}; {AGAIN}")
    changed = [name for name, mine in zip(features, wanted["features"], strict=True) if name != mine]
    if changed:
        raise PolicyError(f"{folder} was made for other features ({', '.join(map(str, changed))}); {AGAIN}")
    if manifest.get("table") != wanted["table"]:
        raise PolicyError(f"{folder} was made for another action table; {AGAIN}, or pass its own as `table`")


_GIVE = "give the folder of an exported policy, or train one (`echo-rl train`)"
_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "tanh": np.tanh, "relu": lambda x: np.maximum(x, np.float32(0.0)),
}  # fmt: skip
