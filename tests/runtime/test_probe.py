"""Probing leaves the engine as it was and runs the sizes it was asked for."""

from __future__ import annotations

import pytest

from echo_rl.contracts import Request
from echo_rl.errors import ConfigError
from echo_rl.runtime.probe import Probe
from tests import tiny


def test_passes_have_the_sizes_asked_for_and_leave_nothing(tmp_path, monkeypatch):
    engine = tiny.engine(tmp_path)
    seen: list[int] = []
    forward = engine.runner.target.forward

    def spy(tokens, *rest):
        seen.append(len(tokens))
        return forward(tokens, *rest)

    monkeypatch.setattr(engine.runner.target, "forward", spy)
    probe = Probe(engine)
    assert probe.verify(3, 11, 40) > 0.0
    assert probe.verify(4, 4, 10) > 0.0
    assert probe.draft(2, 3, 4, 30) > 0.0
    assert seen == [11, 4]
    engine.check_integrity()
    assert engine.block_manager.used_share == 0.0


def test_what_does_not_fit_is_refused(tmp_path):
    engine = tiny.engine(tmp_path, kv_tokens=512)
    with pytest.raises(ConfigError, match="kv_tokens"):
        Probe(engine).verify(8, 8, 200)
    with pytest.raises(ConfigError, match="max_context"):
        Probe(tiny.engine(tmp_path / "short", max_context=64)).verify(1, 256, 32)
    engine.check_integrity()
    engine.add(Request("busy", (5, 6)))
    with pytest.raises(ConfigError, match="idle"):
        Probe(engine)
