"""The vectorised replay makes the decisions of ECHO's rule on the same forests, and takes the same time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.codec import (
    CALIBRATED,
    DEPTHS,
    ActionTable,
    BatchedObservationEncoder,
    Knobs,
    ObservationEncoder,
    planned_gates,
)
from echo_rl.contracts import NO_GATE, Forest, Frontier, SpecPlan
from echo_rl.controllers.echo.echo import CalibratedSelection
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.selection import global_top_k
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.levels import restrict
from echo_rl.replay.machines import another
from echo_rl.replay.scheduler import ReplayScheduler, ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.replay.vector import VectorReplay
from echo_rl.replay.vector_step import BatchedPlan, ForestTables, VectorVerdict
from echo_rl.workloads.arrivals import closed, parse
from tests.one_lane import loads_of, outcomes_of
from tests.recorded import DEPTH, WIDTH, random_levels, random_trace

POWERS = (1.0, 1.1, 1.3)


@pytest.fixture(scope="module")
def costs() -> BatchedCostProfile:
    return BatchedCostProfile(CostProfile.load(packaged("profile.json")))


def plan_forest(trace: Trace, positions: np.ndarray, depth: int, width: int, gates: tuple) -> Forest:
    """What the runtime would have grown, gate by gate."""
    recorded = trace.restricted(width)
    size = recorded.nodes(depth)
    scores = torch.from_numpy(recorded.scores[positions, :size])
    depths = torch.from_numpy(recorded.depths[:size])
    alive, stop = torch.ones(len(positions), dtype=torch.bool), torch.full((len(positions),), depth - 1)
    for gate, tau in gates:
        if gate < depth - 1:
            level = scores.masked_fill((depths != gate) | ~alive[:, None], NO_GATE)
            passed = Frontier(gate, level, alive).confidence >= tau
            stop = torch.where(alive & ~passed, gate, stop)
            alive &= passed
    scores = scores.masked_fill(depths > stop[:, None], NO_GATE)
    return Forest(
        torch.zeros_like(scores).long(), torch.from_numpy(recorded.parents[positions, :size]), depths, scores, stop
    )


@settings(max_examples=80)
@given(
    st.integers(0, 10),
    st.integers(1, 9),
    st.integers(1, 90),
    st.integers(1, DEPTH),
    st.integers(1, WIDTH),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, DEPTH), st.floats(0.0, 0.6)), max_size=3, unique_by=lambda gate: gate[0]),
    st.sampled_from((0.0, 0.01, 0.1, 0.5)),
    st.booleans(),
)
def test_decisions_are_those_of_the_scheduler(seed, batch, budget, depth, width, limit, gates, floor, coarse):
    trace = random_trace(seed % 3)
    if coarse:  # many nodes are equally likely
        trace = replace(trace, levels=tuple(replace(v, scores=np.round(v.scores)) for v in trace.levels))
    positions = np.random.default_rng(seed).integers(0, len(trace.levels[0].path), batch)
    gates = tuple(sorted(gates))
    verdict = decided_beside_others(trace, positions, SpecPlan(budget, depth, width, gates, floor), limit)
    forest = plan_forest(trace, positions, depth, width, gates)
    powers = torch.tensor([*POWERS, *[POWERS[-1]] * DEPTH])[forest.depths]
    scores = forest.scores * powers
    if floor:
        scores = scores.masked_fill(scores < math.log(floor), NO_GATE)
    mask = global_top_k(replace(forest, scores=scores), budget, limit)
    path = trace.restricted(width).path[positions, :depth]
    taken = np.array([[p >= 0 and bool(mask[row, p]) for p in nodes] for row, nodes in enumerate(path)])
    assert verdict.verified[1] == int(mask.sum()) <= budget
    assert verdict.accepted[2 : 2 + batch].tolist() == taken.sum(1).tolist()
    assert verdict.hits[1, :depth].tolist() == taken.sum(0).tolist()
    assert verdict.drafting[1, :depth].tolist() == [int((forest.stop_depth >= d).sum()) for d in range(depth)]
    has = np.stack([mask.numpy()[:, forest.depths.numpy() == d].any(1) for d in range(depth)], axis=1)
    reached = has & (taken.sum(1)[:, None] >= np.arange(depth))
    assert verdict.reached[1, :depth].tolist() == reached.sum(0).tolist()
    assert not any(counts[1, depth:].any() for counts in (verdict.drafting, verdict.reached, verdict.hits))
    plain = [verdict.accepted[:2], verdict.verified[0], verdict.drafting[0], verdict.reached[0], verdict.hits[0]]
    assert not any(np.any(counts) for counts in plain)
    assert 0 < verdict.verified[2] <= 5


def decided_beside_others(trace: Trace, positions: np.ndarray, plan: SpecPlan, limit: int) -> VectorVerdict:
    """The plan's verdict on the second of three servers: the first decodes plainly, the last has a plan of its own."""
    gates = np.full((3, DEPTHS), NO_GATE, np.float32)
    for depth, tau in plan.gates:
        gates[1, depth] = tau if depth < plan.max_depth - 1 else NO_GATE
    plans = BatchedPlan(
        budget=np.array([0, plan.budget, 5]),
        depth=np.array([0, plan.max_depth, 3]),
        width=np.array([2, plan.width, 3]),
        gates=gates,
        floor=np.array([0.5, plan.floor, 0.0]),
    )
    everywhere = np.concatenate([[3, 4], positions, [5, 6, 7]])
    tables = ForestTables([trace.restricted(width) for width in range(1, WIDTH + 1)], POWERS)
    return tables.decide(everywhere, np.array([2, len(positions), 3]), plans, limit)


def test_servers_serve_as_if_each_were_alone(costs):
    """Admission, the shared prompt chunk, prompts alone and the end of requests, on servers of unlike load."""
    trace, limits = random_trace(1), ReplaySchedulerOptions(max_batch=3, prefill_chunk=5, max_nodes=4)
    workloads = (closed(1), closed(4), parse("poisson:20"))

    def servers(count: int) -> VectorReplay:
        return VectorReplay(trace, costs, (1, 2, 3), ((0, 0.3),), POWERS, count, limits, reference=((8, (2.0, 2, 2)),))

    together, alone = servers(3), [servers(1) for _ in workloads]
    for lane, workload in enumerate(workloads):
        together.reset(lane, workload, seed=lane)
        alone[lane].reset(0, workload, seed=lane)
    g = np.random.default_rng(0)
    for _ in range(120):
        gates = g.choice([CALIBRATED, 0.0, 0.4], 3)
        columns = (g.integers(0, 4, 3) * 1.0, g.integers(1, 5, 3), g.integers(1, 4, 3), gates, np.zeros(3))
        step = together.step(Knobs(*columns))
        for lane, single in enumerate(alone):
            other = single.step(Knobs(*(column[lane : lane + 1] for column in columns)))
            for name in ("tokens", "decoded", "seconds"):
                assert getattr(step, name)[lane] == getattr(other, name)[0], name
            for name, value in vars(other.outcomes.loads).items():
                assert getattr(step.outcomes.loads, name)[lane] == value[0], name
            assert np.array_equal(step.outcomes.reached[lane], other.outcomes.reached[0])
            assert np.array_equal(step.outcomes.confidence[lane], other.outcomes.confidence[0], equal_nan=True)
            assert step.reference.seconds[lane] == other.reference.seconds[0]
            assert step.within(0.01)[lane] == other.within(0.01)[0]
    assert step.outcomes.loads.waiting[1] == 1.0  # more than fits


class Knobbed(CalibratedSelection):
    """A controller that follows given knobs by ECHO's rule."""

    name = "knobbed"

    def __init__(self, plans):
        super().__init__(GateCalibration((), (), score_power=POWERS))
        self.plans = iter(plans)

    def propose(self, load):
        plan = next(self.plans)
        return replace(plan, budget=plan.budget * load.batch_size)


def test_the_vectorised_replay_is_the_replay_backend(costs):
    """Same requests, same knobs: same tokens, same seconds and same observations, step by step."""
    trace, gates = random_trace(5), ((0, 0.3), (2, 0.1))
    replay = VectorReplay(trace, costs, (1, 2, 3, 4), gates, POWERS, count=1, noisy=False)
    replay.reset(0, closed(5), seed=7)
    picks = np.random.default_rng(7)
    backend = ReplayBackend(trace, costs, ReplayOptions(noise=False))
    requests = trace.requests()
    sent = 0

    def top_up(running: int) -> None:
        nonlocal sent
        for _ in range(5 - running):
            backend.add(replace(requests[int(picks.choice(len(requests)))], id=f"r{sent}"))
            sent += 1

    g = np.random.default_rng(0)
    shapes = [
        (int(g.integers(0, 4)), int(g.integers(1, 6)), int(g.integers(1, 5)), float(g.choice((0.0, 0.2))))
        for _ in range(300)
    ]
    plans = [
        SpecPlan(n, d, w, planned_gates(gates, d, CALIBRATED, floor), floor) if n else SpecPlan(0)
        for n, d, w, floor in shapes
    ]
    controller = Knobbed(plans)
    one, many = ObservationEncoder(costs.profile), BatchedObservationEncoder(costs)
    top_up(0)
    running = 5
    for nodes, depth, width, floor in shapes:
        arrived = 0
        while True:
            report = backend.step(controller)
            arrived += report.load.arrived  # a vectorised server's view counts those of the prompt steps before it
            running -= sum(o.finish_reason is not None for o in report.outputs)
            top_up(running)
            running = 5
            one.update(report)
            if report.load.batch_size:
                break
            many.update(outcomes_of(report))  # its arrivals are told again
        report = replace(report, load=replace(report.load, arrived=arrived))
        loads = replay.loads()
        step = replay.step(Knobs(*(np.array([x]) for x in (float(nodes), depth, width, CALIBRATED, floor))))
        assert loads_of(report.load) == loads
        assert step.tokens[0] == sum(len(o.tokens) for o in report.outputs)
        assert step.outcomes.verified[0] == report.verified
        assert step.seconds[0] == pytest.approx(report.times.total, rel=1e-9)
        seen = outcomes_of(report)
        for name in ("budget", "depth", "width", "verified", "committed", "reached", "accepted"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(step.outcomes, name), name)
        many.update(step.outcomes)
        np.testing.assert_allclose(one.observe(report.load), many.observe(loads)[0], rtol=1e-5, atol=2e-3)
    assert backend.clock() == pytest.approx(float(replay.now[0]), rel=1e-9)


def test_the_drafter_catches_up_on_the_prompt_and_on_plain_steps():
    """Past two tokens a request, which drafting always takes."""
    trace = random_trace(2)
    scheduler = ReplayScheduler(trace, ReplaySchedulerOptions())
    scheduler.add(3)
    none, seen = np.zeros(0, dtype=np.int64), []
    scheduler.commit(scheduler.schedule(), none, np.array([False]))
    for accepted, drafted in ((0, False), (3, True), (0, False), (0, False), (0, True)):
        seen.append(scheduler.schedule().unseen.tolist())
        scheduler.commit(scheduler.schedule(), np.array([accepted]), np.array([drafted]))
    prompt = len(trace.responses[3].prompt)
    assert seen == [[prompt - 2.0], [prompt - 1.0], [2.0], [3.0], [4.0]]


def test_plans_of_actions_are_their_knobs():
    table = ActionTable()
    knobs = table.knobs(np.array([[0, 2, 1, 1, 0], [4, 3, 2, 0, 3]]))
    assert knobs.budget(np.array([7, 7])).tolist() == [0, 14]
    with pytest.raises(ConfigError, match="outside"):
        table.knobs(np.array([[0, 9, 0, 0, 0]]))
    for nodes, depth, width in ((0.0, 1, 1), (7.0, 4, 3), (60.0, 8, 10)):
        action = table.nearest(nodes, depth, width)
        found = table.knobs(np.array(action))
        assert (found.nodes[0] > 0) == (nodes > 0)
        assert abs(found.depth[0] - depth) <= 0 and abs(found.width[0] - width) <= 2


def test_each_lane_has_the_costs_of_its_own_machine(costs):
    g = np.random.default_rng(3)
    lanes, machines = BatchedCostProfile(costs.profile, 3), [another(costs.profile, g) for _ in range(3)]
    for lane, machine in enumerate(machines):
        lanes.put(lane, machine)
    batch, rows, context = np.array([1.0, 6.0, 32.0]), np.array([9.0, 40.0, 300.0]), np.array([90.0, 10.0, 500.0])
    for lane, machine in enumerate(machines):
        single = BatchedCostProfile(machine)
        at = (float(batch[lane]), float(rows[lane]), float(context[lane]))
        assert (
            lanes.verify(batch, rows, context)[lane] == single.verify(*at) == pytest.approx(machine.verify_seconds(*at))
        )
        nodes = np.array([0.0, 5.0])
        levels = np.array([1, 3])
        assert (lanes.overhead(batch[:, None], nodes, True)[lane] == single.overhead(at[0], nodes, True)).all()
        assert (lanes.draft(batch[:, None], 3, levels)[lane] == single.draft(at[0], 3, levels)).all()
        assert lanes.scalar("catch_up")[lane] == machine.catch_up
    with pytest.raises(ConfigError, match="same grid"):
        lanes.put(0, replace(costs.profile, widths=tuple(w + 1 for w in costs.profile.widths)))
    with pytest.raises(ConfigError, match="same grid"):
        costs.put(0, costs.profile)


def test_other_machines_are_sound_and_differ(costs):
    """`CostProfile` itself refuses one that gets faster as work grows; more requests than rows are never a pass."""
    machines = [another(costs.profile, np.random.default_rng(seed)) for seed in (*range(40), 0)]
    assert machines[0] == machines[-1] != machines[1]
    ratios = [m.verify_seconds(1, 64) / m.verify_seconds(1, 1) for m in machines]
    usual = costs.profile.verify_seconds(1, 64) / costs.profile.verify_seconds(1, 1)
    assert min(ratios) < 0.75 * usual and max(ratios) > 1.4 * usual
    assert all(m.verify_seconds(32, 1) == m.verify_seconds(32, 32) for m in machines)


def test_restricted_levels_follow_the_beam():
    """Width 1 is the greedy chain: the best child of the best child."""
    levels = random_levels(3, 4)
    chain = restrict(levels, 1)
    for p in range(4):
        place = 0
        assert chain.scores[p, 0] == levels[0].scores[p, 0, 0]
        for d, level in enumerate(levels[1:], 1):
            group = int(np.flatnonzero(level.parents[p] == place)[0])
            assert chain.scores[p, d] == level.scores[p, group, 0]
            place = group * WIDTH


def test_no_plan_is_decided_on_the_forests_of_another_width(costs):
    replay = VectorReplay(random_trace(), costs, (1, 4), (), (), 1, reference=((64, (3.0, 2, 3)),))
    replay.reset(0, closed(2), seed=0)
    with pytest.raises(AssertionError, match="width"):
        replay.step(Knobs(*(np.array([x]) for x in (2.0, 2, 4, CALIBRATED, 0.0))))
