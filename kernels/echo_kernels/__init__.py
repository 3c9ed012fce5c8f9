"""Offers the runtime's numeric operations behind one switch.

    from echo_kernels import ops_for
    ops = ops_for("cpu")              # chosen once
    y = ops.rms_norm(x, weight, eps)  # no branching a call

Knows tensors, pages and slots; knows nothing of models, requests' lives or sampling rules.
"""

from echo_kernels.dispatch import ENV_VAR, backend, ops_for
from echo_kernels.ops import Ops

__all__ = ["ENV_VAR", "Ops", "backend", "ops_for"]
