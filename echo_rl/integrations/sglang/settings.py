"""The plugin's one configuration file (TOML or JSON), read strictly.

SGLang gives a plugin no command-line options, so the environment variable ``ECHO_RL_CONFIG`` names the
file. `EXAMPLE` is one.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from echo_rl.config import from_mapping
from echo_rl.contracts import Controller
from echo_rl.controllers import registry
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

EXAMPLE = """\
mode = "adaptive"       # chains of a decided length; "trees": trees of a decided size
controller = "ppo"
profile = "packaged"    # this machine's costs: a file that `echo-rl calibrate` made, or the default ones
gates = "packaged"      # the drafter's gates

[options]               # the controller's own options
deterministic = true

[[shapes]]              # what SGLang prepares, and captures CUDA graphs for
steps = 3
max_batch = 64

[[shapes]]
steps = 0               # plain decoding
"""
ENVIRONMENT = "ECHO_RL_CONFIG"
PACKAGED = "packaged"
"""The `profile` or `gates` that ``echo-rl calibrate`` measured on this machine, else those of the package."""

Mode = Literal["adaptive", "trees"]

CHAINS = (
    *("none", "chain", "fixed", "turbospec", "sglang_adaptive", "dspark", "adaspec", "evict", "bandit"),
    *("echo", "echo_dense", "echo_fixed", "echo_unscheduled", "ppo"),
)
"""Controllers whose decision means something for chains of one length a step."""
TREES = (
    *("none", "chain", "fixed", "eagle2", "eagle3", "turbospec", "sglang_adaptive", "bandit"),
    *("echo", "echo_dense", "echo_fixed", "ppo"),
)
"""Controllers that decide before the forest is drafted: SGLang's forest never leaves the device."""
TIMELESS = ("none", "chain", "fixed", "eagle2", "eagle3")
"""Controllers that don't look at what a step took, and so need no cost profile."""
ALLOWED: Mapping[str, tuple[str, ...]] = {"adaptive": CHAINS, "trees": TREES}


@dataclass(frozen=True)
class Shape:
    """One way for SGLang to run a step; a CUDA graph is captured for each and every batch size that may use it."""

    steps: int
    """The levels drafted; 0 is plain decoding."""
    width: int
    """The rows verified for a request, its root included (SGLang's ``num_draft_tokens``); a chain has steps + 1."""
    max_batch: int | None = None
    """The most requests in a batch that may use it; None for any number."""

    def __post_init__(self) -> None:
        for name in ("steps", "width", "max_batch"):
            value = getattr(self, name)
            if not (name == "max_batch" and value is None) and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"shape {name} is {value!r}; give a whole number")
        if self.steps < 0 or self.width < self.steps + 1 or (not self.steps and self.width > 1):
            raise ConfigError(
                f"a shape of {self.steps} steps has width {self.width}; give steps + 1 or more, 1 for 0 steps"
            )
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(f"shape max_batch is {self.max_batch}; give at least 1, or leave it out for any batch")

    @classmethod
    def chain(cls, steps: int, max_batch: int | None = None) -> Shape:
        return cls(steps, steps + 1, max_batch)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Shape:
        """Reads a table of the file; its width defaults to a chain's. Raises `ConfigError`."""
        steps = values.get("steps")
        if steps is None:
            raise ConfigError("a shape has no steps; give each [[shapes]] table its steps")
        return from_mapping(cls, {"width": steps + 1 if isinstance(steps, int) else 1, **values})

    @property
    def nodes(self) -> int:
        """The drafted nodes verified for one request."""
        return self.width - 1

    def allows(self, batch: int) -> bool:
        return self.max_batch is None or batch <= self.max_batch


DEFAULT_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "adaptive": tuple(Shape.chain(steps) for steps in (0, 1, 2, 3, 5, 7)),
    "trees": (Shape.chain(0), Shape(2, 4), Shape(4, 8), Shape(5, 16, 32), Shape(5, 32, 8)),
}


@dataclass(frozen=True)
class PluginConfig:
    """The contents of the file. Raises `ConfigError`, naming the remedy."""

    controller: str
    """A controller's name (`CHAINS`, `TREES`)."""
    mode: str = "adaptive"
    """``adaptive``: chains, with ``--speculative-adaptive`` at top-k 1. ``trees``: trees, at top-k above 1."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The controller's options."""
    profile: str | None = None
    """A file of this machine's costs, or ``packaged``; no default, since costs of another machine mislead."""
    gates: str | None = None
    """A file of the drafter's gates, or ``packaged``; no default, for the same reason."""
    shapes: tuple[Shape, ...] = ()
    """The shapes to choose from; `DEFAULT_SHAPES` where empty."""
    untested_version: bool = False
    """Also run on an SGLang version that the contract wasn't recorded from, where its symbols all match."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode is {self.mode!r}; give one of {', '.join(get_args(Mode))}")
        for name, kind in (("controller", str), ("profile", str | None), ("gates", str | None)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give text")
        if not isinstance(self.options, Mapping) or not isinstance(self.untested_version, bool):
            raise ConfigError("options must be a table, untested_version true or false")
        if self.controller not in ALLOWED[self.mode]:
            raise ConfigError(
                f"controller {self.controller!r} can't decide for mode {self.mode!r}; "
                f"give one of {', '.join(ALLOWED[self.mode])}"
            )
        self._check_shapes()

    @property
    def choices(self) -> tuple[Shape, ...]:
        return self.shapes or DEFAULT_SHAPES[self.mode]

    @property
    def launch(self) -> Shape:
        """The largest shape, which SGLang must be started with: its memory is sized from it."""
        return max(self.choices, key=lambda shape: (shape.width, shape.steps))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> PluginConfig:
        """Reads the whole file. Raises `ConfigError` on an unknown key, a wrong type or a value out of range."""
        if "controller" not in values:
            raise ConfigError(f"no controller is named; give one of {', '.join(CHAINS)}")
        shapes = values.get("shapes", ())
        if not isinstance(shapes, list | tuple) or not all(isinstance(shape, Mapping) for shape in shapes):
            raise ConfigError("shapes must be a list of tables with steps, width and max_batch")
        return from_mapping(cls, {**values, "shapes": tuple(Shape.of(shape) for shape in shapes)})

    @classmethod
    def load(cls, path: str | Path) -> PluginConfig:
        """Reads a ``.toml`` or ``.json`` file. Raises `ConfigError`."""
        path = Path(path)
        readers = {".toml": tomllib.loads, ".json": json.loads}
        if path.suffix not in readers:
            raise ConfigError(f"{ENVIRONMENT} names {path}; give a .toml or .json file")
        try:
            values = readers[path.suffix](path.read_text())
        except OSError as error:
            raise ConfigError(f"{ENVIRONMENT} names {path}, which can't be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold one table of keys")
        try:
            return cls.of(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def make(self) -> Controller:
        """Makes a new controller with the file's options, costs and gates. Raises `ConfigError`."""
        known = {option.name for option in fields(registry.CONTROLLERS[self.controller].options)}
        options = dict(self.options)
        for option, name in (("profile", "profile"), ("calibration", "gates")):
            if option in options:
                raise ConfigError(f"options has {option!r}; give it as {name!r} beside the controller's name")
            if option in known:
                options[option] = self._file(name)
        return registry.make(self.controller, **options)

    def costs(self) -> CostProfile | None:
        """Returns the costs by which a step's seconds are split into phases; None where no rule looks at them."""
        if self.profile is None and self.controller in TIMELESS:
            return None
        return CostProfile.of(self._file("profile"))

    def _file(self, name: str) -> str | None:
        value = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"controller {self.controller!r} needs {name!r}; give the file that `echo-rl calibrate` wrote, "
                f"or {PACKAGED!r} for the defaults"
            )
        return None if value == PACKAGED else str(value)

    def _check_shapes(self) -> None:
        choices = self.choices
        kinds = [(shape.steps, shape.width) for shape in choices]
        if len(set(kinds)) != len(kinds):
            raise ConfigError(f"shapes {kinds} repeat one; give each once")
        if not any(shape.steps == 0 and shape.max_batch is None for shape in choices):
            raise ConfigError("shapes lack plain decoding for every batch; add one with steps = 0 and no max_batch")
        if self.mode == "adaptive" and any(shape.width != shape.steps + 1 for shape in choices):
            raise ConfigError("mode 'adaptive' drafts chains; leave width out of its shapes, or set mode = \"trees\"")
        if max(shape.steps for shape in choices) > self.launch.steps:
            raise ConfigError(f"the widest shape {self.launch} must also be the deepest: SGLang is started with it")
