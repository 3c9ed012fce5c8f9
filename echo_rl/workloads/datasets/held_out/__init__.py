"""The held-out suites: nothing here is ever trained or tuned on them, so that they judge what was.

Their prompts are made from texts, code and records that published packages carry, with requests in many wordings.
"""

from __future__ import annotations

from echo_rl.workloads.datasets.held_out.agent_loops import AGENT_LOOPS
from echo_rl.workloads.datasets.held_out.code_edits import CODE_EDITS
from echo_rl.workloads.datasets.held_out.extraction import EXTRACTION
from echo_rl.workloads.datasets.held_out.questions import QUESTIONS
from echo_rl.workloads.datasets.held_out.retrieval import RETRIEVAL
from echo_rl.workloads.datasets.held_out.summarisation import SUMMARISATION
from echo_rl.workloads.datasets.held_out.translation import TRANSLATION

HELD_OUT = (TRANSLATION, QUESTIONS, SUMMARISATION, RETRIEVAL, EXTRACTION, CODE_EDITS, AGENT_LOOPS)
