"""Encodes what a learned controller sees and decodes what it says: observations of loads and reports, plans of actions.

One package for training and for serving, so the two cannot drift apart; a policy is bound to
`CODEC_VERSION`. A `BatchedObservationEncoder` works on parallel servers ([E] arrays), an `ObservationEncoder`
is one server in plain floats; both say the same, but that the latter looks costs up by half octaves of context. Knows
nothing of rewards, networks or where steps come from.
"""

from echo_rl.codec.actions import CALIBRATED, ActionTable, Knobs, gates_asked, planned_gates
from echo_rl.codec.batched_observations import BatchedObservationEncoder, quantiles
from echo_rl.codec.features import CODEC_VERSION, CONFIDENCE, DEPTHS, FEATURES, GROUPS, visible
from echo_rl.codec.observations import ObservationEncoder

__all__ = [
    "CALIBRATED",
    "CODEC_VERSION",
    "CONFIDENCE",
    "DEPTHS",
    "FEATURES",
    "GROUPS",
    "ActionTable",
    "BatchedObservationEncoder",
    "Knobs",
    "ObservationEncoder",
    "gates_asked",
    "planned_gates",
    "quantiles",
    "visible",
]
