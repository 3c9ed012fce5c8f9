"""With the kernels' own products speculation does not change a bit, in either precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echo_kernels import ops_for
from tests import tiny
from tests.runtime.driving import requests
from tests.runtime.test_engine import Erratic, Plain


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(tmp_path_factory, request):
    if ops_for("cpu").pack_weight(torch.zeros(32, 2, dtype=getattr(torch, request.param))) is None:
        pytest.skip("torch's products are used here: their rounding depends on the number of rows")
    return tiny.engine(tmp_path_factory.mktemp("tiny"), prefill_chunk=16, dtype=request.param)


def likelihoods(engine, controller, todo) -> dict[str, list]:
    """Every token of every request with its log-probability and those of three others."""
    for request in todo:
        engine.add(replace(request, logprobs=3))
    found = {request.id: [] for request in todo}
    while engine.has_work:
        for output in engine.step(controller).outputs:
            found[output.id] += output.logprobs
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_log_probabilities_are_those_of_plain_decoding(engine, batch, temperature):
    todo = requests(batch, temperature)
    plain = likelihoods(engine, Plain(), todo)
    erratic = Erratic(batch)
    assert likelihoods(engine, erratic, todo) == plain
    assert sum(r.accepted for r in erratic.reports) > 0


def test_log_probabilities_do_not_depend_on_the_batch(engine):
    todo = requests(8, 0.8)
    together = likelihoods(engine, Plain(), todo)
    assert all(likelihoods(engine, Plain(), [r])[r.id] == together[r.id] for r in todo)
