"""A replay as the target of an experiment: simulated time over recorded responses."""

from __future__ import annotations

from echo_rl import __version__
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import own_or_packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.targets.backend import Target, facts
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import digest


def replay_target(trace: Trace, noise: bool = True) -> Target:
    """A replay at this machine's measured costs; plans are cut to what the trace holds."""
    profile = CostProfile.default()
    backend = ReplayBackend(trace, BatchedCostProfile(profile), ReplayOptions(noise=noise))
    environment = {"version": __version__, **facts(trace), "profile": profile.provenance, "noise": str(noise)}
    environment["calibration"] = digest(own_or_packaged("profile.json"), own_or_packaged("gates.json"))
    requests, limits = trace.requests(), (trace.max_depth, trace.max_width)
    environment["plans are cut to"] = f"depth {limits[0]}, width {limits[1]}"
    return Target("replay", backend, requests, backend.clock, backend.idle, environment, *limits)


def exact_replay(trace: Trace, costs: BatchedCostProfile, concurrency: int) -> Target:
    """A replay at these costs with room for so many requests; a plan that the trace doesn't hold is an error."""
    limits = ReplaySchedulerOptions(max_batch=max(ReplaySchedulerOptions.max_batch, concurrency))
    backend = ReplayBackend(trace, costs, ReplayOptions(limits))
    return Target("replay", backend, trace.requests(), backend.clock, backend.idle)
