"""The tables of the documentation: from a script's JSON result to Markdown. Knows no file but the results' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.tables import engine, learning, modelled, serving
from benchmarks.tables.markdown import Result

TABLES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "speedup": ("throughput", engine.speedup),
    "throughput": ("throughput", engine.throughput),
    "budget": ("throughput", engine.budget),
    "throughput_held_out": ("throughput_held_out", engine.throughput),
    "acceptance": ("acceptance", engine.acceptance),
    "acceptance_held_out": ("acceptance", engine.acceptance_held_out),
    "plain_decoding": ("plain_decoding", engine.plain_decoding),
    "neighbours": ("neighbours", engine.neighbours),
    "losslessness": ("losslessness", engine.losslessness),
    "fidelity": ("fidelity", learning.fidelity),
    "env_rate": ("env_rate", learning.env_rate),
    "policies": ("policies", learning.policies),
    "deciding": ("policies", learning.deciding),
    "training": ("policies", learning.training),
    "ceiling": ("ceiling", learning.ceiling),
    "ranking": ("ceiling", learning.ranking),
    "ab_live": ("ab_live", learning.ab_live),
    "rivals": ("rivals", learning.rivals),
    "winners": ("rivals", learning.winners),
    "gates": ("rivals", learning.gates),
    "server": ("server", serving.server),
    "server_identity": ("server_identity", serving.server_identity),
    "server_overhead": ("server_overhead", serving.server_overhead),
    "first_token": ("first_token", serving.first_token),
    "soak": ("soak", serving.soak),
    "modelled": ("roofline", modelled.modelled),
    "modelled_break_even": ("roofline", modelled.modelled_break_even),
}
"""Name -> the result it is made of, and how."""

WITHOUT_DRAFTER = ("plain_decoding", "neighbours", "env_rate", "first_token")
"""Results that no drafter takes part in, or that are of the packaged trace."""
