"""The dependency direction, read from the sources' imports: each room imports only rooms below it.

The rooms and their order are the design's. `env`, `controllers` and `runtime` never import each other: they meet in
`contracts`. `echo_kernels` is used by `echo_rl.runtime` alone and knows nothing of `echo_rl`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    {"contracts", "errors", "config"},
    {"utils"},
    {"costs"},
    {"codec"},
    {"workloads"},
    {"runtime"},
    {"controllers"},
    {"replay"},
    {"env"},
    {"learning", "drafting", "calibrate"},
    {"experiments"},
    {"server"},
    {"integrations"},
    {"cli"},
)
"""Lowest first; rooms of one line may import each other."""
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
SEPARATE = {"runtime", "env", "controllers"}
SERVER_ROOMS = {
    "base": set(),
    "guard": {"base"},
    "core": {"base", "guard"},
    "client": {"base", "core"},
    "ui": {"base", "client"},
    "api": {"base", "client", "ui"},
    "serve": {"base", "core", "client", "api"},
}
"""The rooms of the server, and those that each imports; ``base`` are the files that every room reads."""
SERVER_BASE = {"config", "messages", "ipc", "logs", "process", "specs"}
TORCH_FREE = (
    *("contracts", "errors", "config", "utils.archives", "utils.files", "utils.statistics"),
    *(
        "utils.result_store",
        "costs.batched_profile",
        "costs.batched_records",
        "costs.correction",
        "costs.profile",
        "costs.files",
        "codec",
    ),
    *("workloads.driver", "workloads.metrics", "workloads.records", "workloads.datasets"),
    *("experiments.plan", "experiments.report.bench", "experiments.load"),
    *("server.config", "server.client.engine_client", "server.core.worker"),
)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    """The first name under the package: ``echo_rl/runtime/engine.py`` is part of ``runtime``."""
    return path.relative_to(ROOT / "echo_rl").parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path, for_types: bool = True) -> Iterator[str]:
    """Absolute names of all modules that a file imports, those inside functions included.

    ``from package import name`` yields ``package.name`` as well: the name may be a module.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if is_type_checking(node) and not for_types:
            pending.extend(node.orelse)  # type: ignore[attr-defined]
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def echo_parts(path: Path) -> set[str]:
    """The parts of ``echo_rl`` that a file imports."""
    dotted = [name.split(".") for name in imports(path) if name.startswith("echo_rl.")]
    return {names[1] for names in dotted} & set(RANK) | {
        names[1] for names in dotted if (ROOT / "echo_rl" / names[1]).is_dir()
    }


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(path) for path in sources("echo_rl")} - {"__init__", "__main__"}
    assert parts <= set(RANK), "give the new part a level here and in the design"


@pytest.mark.parametrize("path", sources("echo_rl"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part = part_of(path)
    if part == "__init__":
        part = "cli"  # the package root may export from anywhere
    for target in echo_parts(path):
        assert RANK[target] <= RANK[part], f"{part} must not import {target}"
        assert not ({part, target} <= SEPARATE and part != target), f"{part} and {target} meet in contracts only"


def server_room(name: str) -> str:
    return "base" if name in SERVER_BASE else name


@pytest.mark.parametrize("path", sources("echo_rl/server"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_the_server_import_one_way(path):
    room = server_room(path.relative_to(ROOT / "echo_rl/server").parts[0].removesuffix(".py"))
    dotted = (name.split(".") for name in imports(path) if name.startswith("echo_rl.server."))
    imported = {server_room(names[2]) for names in dotted} - {room}
    assert imported <= SERVER_ROOMS.get(room, set()), f"the server's {room} must not import {imported}"


def test_no_module_imports_itself_in_a_circle():
    names = {
        path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for root, folder in ((ROOT, "echo_rl"), (ROOT / "kernels", "echo_kernels"), (ROOT, "benchmarks"))
        for path in sources(str((root / folder).relative_to(ROOT)))
    }
    graph = {
        name: {other for other in set(imports(path)) & set(names.values()) if not f"{name}.".startswith(f"{other}.")}
        for path, name in names.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_kernels_are_used_by_the_runtime_alone():
    for path in sources("echo_rl"):
        if part_of(path) != "runtime":
            assert not any(name.split(".")[0] == "echo_kernels" for name in imports(path)), path


@pytest.mark.parametrize("folder", ["benchmarks", "scripts"])
def test_benchmarks_and_scripts_use_the_library_and_not_the_command_line(folder):
    assert sources(folder)
    for path in sources(folder):
        assert not any(name == "echo_rl.cli" or name.startswith("echo_rl.cli.") for name in imports(path)), path


def test_kernels_know_nothing_of_the_project():
    for path in sources("kernels/echo_kernels"):
        assert not any(name.split(".")[0] == "echo_rl" for name in imports(path)), path


@pytest.mark.parametrize("name", ["contracts", "errors", "costs/profile"])
def test_records_are_readable_without_torch_in_their_source(name):
    path = ROOT / "echo_rl" / f"{name}.py"
    assert not any(module.split(".")[0] == "torch" for module in imports(path, for_types=False))


@pytest.mark.parametrize("module", [*(f"echo_rl.{name}" for name in TORCH_FREE), "echo_rl.cli.app"])
def test_importing_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{module} loads torch"


def test_type_checking_blocks_are_told_apart(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("import os\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json\ndef f():\n    import re\n")
    assert set(imports(path)) == {"os", "torch", "json", "re"}
    assert set(imports(path, for_types=False)) == {"os", "json", "re"}
