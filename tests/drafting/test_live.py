"""The live engine as the writer of conversations."""

from __future__ import annotations

import pytest

from echo_rl.drafting.live import EngineGenerator
from echo_rl.errors import ConfigError
from tests import tiny


def test_the_engine_generator_completes_tokens_and_drops_the_stop(tmp_path):
    complete = EngineGenerator(tiny.engine(tmp_path), concurrency=2)
    prompts = [[70, 71], [70, 71], [72]]
    made = complete(prompts, 1.0, 6, [0])
    assert made == complete(prompts, 1.0, 6, [0])
    assert [len(tokens) for tokens in made] == [6, 6, 6] and made[0] != made[1]
    with pytest.raises(ConfigError, match="does not stop at"):
        complete(prompts, 1.0, 6, [5])
