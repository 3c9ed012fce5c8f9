"""Defines the records and protocols at which the runtime, the environment and the controllers meet.

Importing this module needs no torch: tensors appear in annotations only. Every record is frozen and
is written by exactly one stage of a step, so a half-filled object cannot exist.

Shapes: B requests in the batch, M forest nodes a request (padded), N verified rows in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from echo_rl.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

NO_GATE = float("-inf")
"""A gate threshold that every path passes."""

LOWEST_SCORE = float(np.finfo(np.float32).min)
"""Least score of a node that exists."""

OFF_PATH = -1
"""The token that a replayed forest gives every node that the target didn't choose: which one it was changes nothing."""


MAX_LOGPROBS = 20
"""Most alternatives that a request may ask for with every token."""


LEAST_TEMPERATURE = 1e-5
"""Below it logits over the temperature would leave float32."""
MOST_TEMPERATURE = 1e38
"""Above it the temperature itself would; draws are even from far below."""


@dataclass(frozen=True)
class SamplingParams:
    """The parameters by which one request's tokens are drawn.

    The token at position p is ``argmax(logits / temperature + Gumbel(seed, p))`` after top-k and
    top-p filtering; a temperature below `LEAST_TEMPERATURE` counts as 0, which is the plain argmax.
    Raises `RequestError` on values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    """Strings that end the output, the first in the text counting; the stop string itself is not returned."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; give a finite number >= 0 (0 is greedy)")
        if not 0 <= self.top_k < 2**63:
            raise RequestError(f"top_k is {self.top_k}; give 0 (off) or a positive count below 2**63")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; give a number in (0, 1]")
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; give an integer in [0, 2**63)")
        if "" in self.stop:
            raise RequestError("a stop string is empty; give at least one character, or no stop string at all")

    @property
    def drawn_at(self) -> float:
        """The temperature that counts: 0 for the plain argmax, and one that float32 holds."""
        return min(self.temperature, MOST_TEMPERATURE) if self.temperature >= LEAST_TEMPERATURE else 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to complete. `prompt` holds target token ids."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    speculate: bool = True
    """False: one token a step for this request, whatever the controller plans for the others."""
    logprobs: int | None = None
    """Number of likeliest alternatives to report with every token; 0 = the token's own alone, None = nothing."""

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs is {self.logprobs}; give 0 to {MAX_LOGPROBS} alternatives, or none at all")


@dataclass(frozen=True)
class LoadView:
    """Everything that a controller may know before a step: scalars only, no hidden states."""

    batch_size: int
    """Requests that decode in this step and may speculate (B)."""
    prefill_tokens: int
    """Prompt tokens that share this step's forward pass."""
    waiting: int
    """Requests queued and not yet admitted."""
    mean_context: float
    """Mean committed tokens of the decoding requests."""
    kv_used: float
    """Share of KV blocks in use, in [0, 1]."""
    max_nodes: int
    """Most drafted nodes that one request may have verified in a step."""
    arrived: int = 0
    """Requests added since the step before."""
    plain: int = 0
    """Requests that decode beside them and asked for no speculation."""

    @property
    def decoding(self) -> int:
        """Requests with a row of their own in the pass, whether they speculate or not."""
        return self.batch_size + self.plain


Gates = tuple[tuple[int, float], ...]
"""(depth, least best-path probability) of each gate, in order of depth."""


@dataclass(frozen=True)
class SpecPlan:
    """The knobs of one step.

    `budget` bounds the drafted nodes verified over the *whole batch*; the roots (one a request, the
    tokens plain decoding would process anyway) are not counted. Budget 0 is plain decoding: the
    drafter is not run. `gates` maps a depth (0 = the root's children) to the least best-path
    probability at which a request keeps drafting past that depth.
    """

    budget: int
    max_depth: int = 1
    """Levels of the tree; a chain of d tokens has depth d."""
    width: int = 1
    """Nodes expanded a level, and children proposed by each."""
    gates: Gates = ()
    floor: float = 0.0
    """Least path probability at which ECHO's scheduler verifies a node, even where budget is left."""
    nested: bool = False
    """Expand also what every narrower width would expand, so that the forest contains theirs (recording)."""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ConfigError(f"budget is {self.budget}; give 0 (plain decoding) or more")
        if self.budget and (self.max_depth < 1 or self.width < 1):
            raise ConfigError(f"depth {self.max_depth} and width {self.width} must be at least 1 when budget > 0")
        if not 0.0 <= self.floor < 1.0:
            raise ConfigError(f"floor is {self.floor}; give a probability below 1, 0 for none")

    @property
    def speculates(self) -> bool:
        return self.budget > 0

    @property
    def expanded(self) -> int:
        """Most nodes that the drafter runs on for one request."""
        level = self.width * (self.width + 1) // 2 if self.nested else self.width
        return level * (self.max_depth - 1) if self.speculates else 0

    def within(self, depth: int, width: int) -> SpecPlan:
        """This plan cut to so many levels and so wide a beam; itself where it fits."""
        if not self.speculates or (self.max_depth <= depth and self.width <= width):
            return self
        return replace(self, max_depth=min(self.max_depth, depth), width=min(self.width, width))

    def gate(self, depth: int) -> float | None:
        """The threshold at this depth, or None where the plan has no gate."""
        return dict(self.gates).get(depth)


AUTOREGRESSIVE = SpecPlan(budget=0)


@lru_cache(maxsize=64)
def least_score(floor: float) -> float:
    """The score of a path probability, rounded as scores are; for 0 the least of a node that exists."""
    return float(np.float32(math.log(floor))) if floor else LOWEST_SCORE


@dataclass(frozen=True)
class Frontier:
    """The level just drafted, shown to `Controller.extend` at gated depths."""

    depth: int
    scores: Tensor  # [B, F] cumulative log-probability of the level's candidates, -inf where padded
    alive: Tensor  # [B] bool, requests that drafted this level

    @property
    def confidence(self) -> Tensor:
        """[B] probability of each request's best path (ECHO's c)."""
        return self.scores.amax(dim=1).exp()


@dataclass(frozen=True)
class Forest:
    """Every candidate that the drafter proposed, one tree a request, levels in order.

    Parents precede their children within a row and a child's score never exceeds its parent's, so
    the first K nodes by (score, index) are always closed under ancestors.
    """

    tokens: Tensor  # [B, M] int64, target vocabulary
    parents: Tensor  # [B, M] int64, index into the same row; -1 for a child of the root
    depths: Tensor  # [M] int64, 0 for the root's children
    scores: Tensor  # [B, M] float32 cumulative log-probability; -inf where the node does not exist
    stop_depth: Tensor  # [B] int64, depth of the last level that the request drafted

    @property
    def batch_size(self) -> int:
        return self.scores.shape[0]

    @property
    def exists(self) -> Tensor:
        return self.scores > NO_GATE

    @property
    def drafting(self) -> tuple[int, ...]:
        """Requests that drafted depth d, at index d."""
        stops = self.stop_depth.tolist()
        return tuple(sum(stop >= depth for stop in stops) for depth in range(max(stops) + 1))

    @property
    def first_confidence(self) -> tuple[float, ...]:
        """The drafter's probability of its likeliest first token, one a request."""
        first = np.count_nonzero(self.depths.cpu().numpy() == 0)  # levels are in order
        return tuple(np.exp(self.scores.cpu().numpy()[:, :first].max(1)).tolist())


@dataclass(frozen=True)
class Selection:
    """The nodes to verify, packed request by request, parents before children. K = sum(counts)."""

    counts: Tensor  # [B] int64, drafted nodes a request
    tokens: Tensor  # [K] int64
    parents: Tensor  # [K] int64, index among the *same request's* selected nodes; -1 = child of the root
    depths: Tensor  # [K] int64, 0 for the root's children

    @property
    def size(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the target's plain distribution: temperature 1, nothing filtered."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Verdict:
    """The decision of verification for every request that samples (decodes, then prompts that end in this step)."""

    accepted: tuple[tuple[int, ...], ...]  # per request: accepted nodes (index among its selected nodes), root first
    tokens: tuple[tuple[int, ...], ...]  # per request: the accepted nodes' tokens, then the bonus token
    failed: frozenset[int] = frozenset()  # requests whose logits were not finite; `tokens` are those before
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # per request, one a token where it asked; () if nobody did


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds spent in each phase of a step."""

    schedule: float = 0.0
    plan: float = 0.0
    draft: float = 0.0
    select: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0

    @property
    def total(self) -> float:
        return self.schedule + self.plan + self.draft + self.select + self.verify + self.accept + self.commit


@dataclass(frozen=True)
class RequestOutput:
    """New tokens of one request after a step. `finish_reason` is None while it runs."""

    id: str
    tokens: tuple[int, ...]
    text: str = ""
    """Text that became certain in this step; characters that could still change are held back."""
    finish_reason: str | None = None
    """``stop`` (EOS or a stop string), ``length``, ``cancelled`` or ``error``."""
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, where the request asked for them."""


@dataclass(frozen=True)
class RequestTree:
    """The nodes that were verified for one request in a step, kept to show them."""

    id: str
    parents: tuple[int, ...]
    """Each node's parent among the nodes; -1 = child of the root."""
    depths: tuple[int, ...]
    """Each node's depth; 0 = child of the root."""
    accepted: tuple[int, ...]
    """The nodes of the accepted path, root first."""
    drafted_depth: int
    """Levels that the drafter ran for this request; more than the deepest node where the budget was short."""


@dataclass(frozen=True)
class StepReport:
    """The record of one step: the only thing a controller learns from."""

    load: LoadView
    plan: SpecPlan
    outputs: tuple[RequestOutput, ...]
    drafted: int
    """Nodes that the drafter proposed, over the batch."""
    verified: int
    """Drafted nodes that were verified; never more than plan.budget."""
    accepted: int
    """Drafted nodes that were accepted."""
    committed: int
    """Tokens committed by the B requests of `load`, bonus tokens included (before any cut by a stop)."""
    reached_by_depth: tuple[int, ...]
    """Requests with a selected node at depth d whose path was accepted up to depth d - 1, at index d."""
    accepted_by_depth: tuple[int, ...]
    """Requests that accepted a node at depth d, at index d."""
    times: PhaseTimes
    drafting: tuple[int, ...] = ()
    """Requests that drafted depth d, at index d."""
    confidence: tuple[float, ...] = ()
    """The drafter's probability of its likeliest first token, one a decoding request; empty in a plain step."""
    trees: tuple[RequestTree, ...] = ()
    """The nodes that were verified for each of the B requests, where the backend was asked to show them."""
    contended: bool = field(default=False, compare=False)
    """True while other processes keep the serving threads from their processors: its times are not those of an idle
    machine."""


@runtime_checkable
class Controller(Protocol):
    """Decides a step's speculation. Implementations: `echo_rl.controllers`."""

    name: str

    def plan(self, load: LoadView) -> SpecPlan: ...

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: the requests that keep drafting. Called only at the plan's gated depths."""
        ...

    def select(self, forest: Forest, plan: SpecPlan) -> Selection: ...

    def observe(self, report: StepReport) -> None: ...


@runtime_checkable
class FollowsPlan(Protocol):
    """A controller that can say when its `extend` and `select` follow from the plan and nothing else.

    Then a request keeps drafting while its best path is at least as likely as the plan's gate at that
    depth, and the batch's likeliest nodes are verified, at most the plan's budget and `max_nodes` a
    request, ties by (node, request), by path probability to the power of its depth, none below the
    plan's floor.
    """

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """The power at each depth, the last one holding beyond; () for 1 everywhere. None where this plan's
        gates or selection are the controller's own code."""
        ...


MakeController = Callable[..., Controller]
"""Makes a controller: ``make(name, **options)``."""


class Backend(Protocol):
    """Something that serves steps: the live engine, or a replay of recorded forests.

    A step has two phases. `prepare` forms its batch and tells the load; the step then waits for a plan, for as long
    as it takes to find one, and `execute` serves it. `step` is both in a row for a controller that plans at once.

    Between the phases requests may come and go. One that is added waits for the next step: the prepared batch and
    its load stay as they are. One that is cancelled frees its memory at once and takes the prepared batch apart;
    the next `prepare`, or `execute` without one, forms it anew from the requests that are left.
    """

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` where it could never be served."""
        ...

    def cancel(self, request_id: str) -> None:
        """Drop a request. Unknown and finished ids are ignored."""
        ...

    def prepare(self) -> LoadView:
        """Form the coming step's batch, and tell what a controller may know of it.

        Waiting requests are admitted, but none advances: until `execute` it gives the same load again. A load whose
        `batch_size` is 0 is that of a step in which nobody may speculate (prompts alone, or requests that asked for
        no speculation): its plan is `AUTOREGRESSIVE`, and no controller is asked for one.
        Raises `ConfigError` where there is no work.
        """
        ...

    def execute(self, plan: SpecPlan, controller: Controller) -> StepReport:
        """Serve the prepared step by this plan, or prepare one first where none is.

        The controller extends, selects and observes the report. It isn't asked for a plan: where its selection
        depends on the load, show it the load by its `plan` first. Where nobody may speculate any plan is taken for
        `AUTOREGRESSIVE`. The time since `prepare` is in none of the report's phases.
        Raises what the controller raises, and `PlanViolation` where it asks for more than the plan or the backend
        allows: then no token is committed, and the next step is prepared anew. Raises `ConfigError` where there is
        no work.
        """
        ...

    def step(self, controller: Controller) -> StepReport:
        """`prepare`, the controller's plan where somebody may speculate, and `execute`."""
        ...


@runtime_checkable
class Restartable(Protocol):
    """A backend that can begin anew from the same state (time 0, its noise seeded)."""

    def restart(self, seed: int) -> None: ...
