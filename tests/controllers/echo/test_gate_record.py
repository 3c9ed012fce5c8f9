"""The gate record: plans' gates, validation, round trip."""

from __future__ import annotations

import json
import math

import pytest

from echo_rl.controllers.echo.gates import DepthGate, GateCalibration, Rate
from echo_rl.errors import ConfigError

CALIBRATION = GateCalibration(
    depths=(
        DepthGate(0, 0.2, 100, Rate(0.8, 0.7, 0.9), Rate(0.1, 0.05, 0.2), Rate(0.3, 0.2, 0.4)),
        DepthGate(1, 0.25),
        DepthGate(3, 0.4),
    ),
    chosen=(0, 3),
    score_power=(1.0, 1.5),
    provenance="test",
)


def test_sparse_gates_stop_before_the_last_level():
    assert CALIBRATION.sparse(8) == ((0, 0.2), (3, 0.4))
    assert CALIBRATION.sparse(4) == ((0, 0.2),)
    assert CALIBRATION.sparse(1) == ()


def test_dense_gates_fill_unmeasured_depths():
    assert CALIBRATION.dense(6) == ((0, 0.2), (1, 0.25), (2, 0.25), (3, 0.4), (4, 0.4))


def test_round_trip(tmp_path):
    CALIBRATION.save(tmp_path / "gates.json")
    assert GateCalibration.load(tmp_path / "gates.json") == CALIBRATION


def test_packaged_default_loads_and_says_where_it_is_from():
    default = GateCalibration.default()
    assert default.provenance and default.sparse(8)


@pytest.mark.parametrize("damage", ["", "[]", '{"kind": "cost profile"}'])
def test_foreign_files_are_refused(tmp_path, damage):
    path = tmp_path / "gates.json"
    path.write_text(damage)
    with pytest.raises(ConfigError, match=r"gates\.json"):
        GateCalibration.load(path)


@pytest.mark.parametrize("field, damage", [("chosen", None), ("depths", [[0, 0.3]])])
def test_damaged_fields_are_refused(tmp_path, field, damage):
    path = tmp_path / "gates.json"
    CALIBRATION.save(path)
    record = json.loads(path.read_text())
    if damage is None:
        del record["body"][field]
    else:
        record["body"][field] = damage
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="not a usable gate calibration"):
        GateCalibration.load(path)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DepthGate(0, 1.5),
        lambda: DepthGate(-1, 0.5),
        lambda: GateCalibration((DepthGate(1, 0.1), DepthGate(0, 0.1)), ()),
        lambda: GateCalibration((DepthGate(0, 0.1),), (2,)),
        lambda: GateCalibration((), (), (1.0, 0.9)),
        lambda: GateCalibration((), (), (1.0, math.nan)),
        lambda: GateCalibration((), (), (math.inf,)),
    ],
)
def test_impossible_gates_are_refused(build):
    with pytest.raises(ConfigError):
        build()
