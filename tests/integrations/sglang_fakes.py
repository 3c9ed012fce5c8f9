"""Stand-ins for what SGLang hands to the plugin, and the real SGLang where it is installed."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

from echo_rl.contracts import LoadView
from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang import contract
from echo_rl.integrations.sglang.state import PluginState

MISSING = (
    f"sglang=={contract.RECORDED} is not importable here; scripts/sglang_contract.sh runs these tests in a throw-away "
    "environment that has it"
)


def require_sglang():
    """Skips, visibly, where SGLang isn't installed; else makes it importable without a GPU while the result is held.

    Where `SGLANG_CONTRACT` says that it must be there, a missing SGLang fails instead.
    """
    if importlib.util.find_spec("sglang") is None:
        if os.environ.get("SGLANG_CONTRACT"):
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING, allow_module_level=True)
    return stub_torchvision()


def stub_torchvision():
    """torchvision's compiled half needs its own torch build; SGLang imports only its Python half."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def load(batch=2, context=100.0, waiting=0, max_nodes=7, **changes):
    return LoadView(batch, 0, waiting, context, 0.25, max_nodes, **changes)


def parallel(**changes):
    return SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "attn_dp_size": 1, **changes})


def plugin_state(config):
    """A plugin state whose counters are its own."""
    try:
        from prometheus_client import CollectorRegistry
    except ImportError:
        return PluginState(config)
    return PluginState(config, CollectorRegistry())


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def mode(kind):
    return SimpleNamespace(is_decode=lambda: kind == "decode", is_extend=lambda: kind == "extend")


def scheduler(waiting=0, used=0.5):
    stats = SimpleNamespace(get_kv_token_stats=lambda: (0, used))
    observer = SimpleNamespace(get_pool_stats=lambda: stats)
    return SimpleNamespace(waiting_queue=[None] * waiting, pool_stats_observer=observer)


def batch(kind, *lengths, first="r"):
    requests = [SimpleNamespace(rid=f"{first}{i}", seqlen=n) for i, n in enumerate(lengths)]
    return SimpleNamespace(forward_mode=mode(kind), reqs=requests, extend_num_tokens=sum(lengths))


def raises_config(match):
    return pytest.raises(ConfigError, match=match)
