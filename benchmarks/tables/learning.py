"""Tables of replays, of all controllers on them, and of learned ones."""

from __future__ import annotations

from benchmarks.intervals import geometric_mean
from benchmarks.tables.markdown import Result, number, table
from echo_rl.utils.statistics import Interval


def fidelity(result: Result) -> str:
    """How a replay's throughput compares with the live loop's."""
    cells: dict[tuple[int, str], list[float]] = {}
    for cell in result["cells"]:
        cells.setdefault((cell["concurrency"], cell["arm"]), []).append(cell["replay"] / cell["live"])
    loads = sorted({load for load, _ in cells})
    arms = dict.fromkeys(arm for _, arm in cells)
    rows = [[f"`{arm}`", *(number(sum(cells[c, arm]) / len(cells[c, arm])) for c in loads)] for arm in arms]
    taus = ["Kendall's tau", *(number(result["kendall_tau"][str(load)]) for load in loads)]
    exact, speeds = result["exact"], result["speed"]
    words = (
        f"\nMedian error {result['median_error']:.1%}. Arms that the two rank differently are at most "
        f"{result['most_apart_if_swapped'] - 1:.0%} apart live. In float32 {exact['differed']} of "
        f"{exact['steps']} steps differ from the live loop. Serving steps a second on one core: "
        + ", ".join(f"{speed:,.0f} at batch {batch}" for batch, speed in speeds.items())
        + ".\n"
    )
    return table(["replayed over live tokens/s", *map(str, loads)], [*rows, taus]) + words


def policies(result: Result) -> str:
    """The learned controller against ECHO and plain serving, workload by workload."""
    names = ("over_echo_by_workload", "hindsight_over_echo", "over_none_by_workload", "echo_over_none")
    rows = [
        [f"`{workload}`", *(Interval(**result[name][i]).text(3, "×") for name in names)]
        for i, workload in enumerate(result["workloads"])
    ]
    rows.append(["all", Interval(**result["over_echo"]).text(3, "×"), "", "", ""])
    rows.append(["other machines", Interval(**result["elsewhere"]["over_echo"]).text(3, "×"), "", "", ""])
    heads = ["workload", "`ppo` over `echo`", "best fixed plan over `echo`", "`ppo` over `none`", "`echo` over `none`"]
    closed, minutes = result["gap_closed"], [result["training"][seed]["seconds"] / 60 for seed in result["seeds"]]
    words = (
        "\nECHO is nowhere behind the best fixed plan."
        if closed is None
        else f"\nWhere ECHO is behind the best fixed plan, the policies close {closed:.0%} of the gap."
    )
    took = f"A policy's training took {min(minutes):.0f} to {max(minutes):.0f} minutes, several on the same two cores."
    return table(heads, rows) + f"{words} {took}\n"


def deciding(result: Result) -> str:
    """What a step's decisions take in all, of a fixed plan, of ECHO and of the policy."""
    timed = result["deciding"]
    rows = [
        [f"`{name}`", *(f"{cell['microseconds']:.0f} µs, {cell['share_of_step']:.1%}" for cell in cells.values())]
        for name, cells in timed.items()
    ]
    return table(["a step's decisions", *(f"{load} in flight" for load in next(iter(timed.values())))], rows)


def training(result: Result) -> str:
    """What each change to the training does to the result."""
    elsewhere = result["elsewhere"]["runs"]
    rows = [
        [name, *(Interval(**interval).text(3, "×") for interval in (here, elsewhere[name]))]
        for name, here in {**result["seeds"], **result["ablations"]}.items()
    ]
    return table(["training", "over `echo`", "on other machines"], rows)


def env_rate(result: Result) -> str:
    """How fast the public environments over a replay are."""
    calls = ("make", "make_vec")
    rows = [
        [f"`gymnasium.{call}`", str(result[call].get("num_envs", 1)), f"{result[call]['env_steps_per_second']:,.0f}"]
        for call in calls
    ]
    return table(["made by", "environments", "environment steps a second"], rows)


def ab_live(result: Result) -> str:
    """The live A/B of the learned controller against ECHO."""
    (venue,) = result["venues"]
    rows = [
        [
            f"`{cell['workload']}`",
            Interval(**cell["ratios"][cell["headline"]]).text(2, "×"),
            *(number(arm["mat"]) for arm in cell["arms"]),
        ]
        for cell in venue["cells"]
    ]
    rows.append(["all", Interval(**venue["overall"]).text(3, "×"), "", ""])
    heads = ["workload, live", f"`{result['b']}` over `{result['a']}`", f"MAT `{result['a']}`", f"MAT `{result['b']}`"]
    return table(heads, rows)


def rivals(result: Result) -> str:
    """Geometric means over loads, the speed-up at each load, and what deciding takes at the smallest; fastest first."""
    loads = sorted({cell["concurrency"] for cell in result["cells"]})
    found = {(cell["arm"], cell["concurrency"]): cell for cell in result["cells"]}
    rows = [
        [
            str(row["rank"] or "-"),
            f"`{row['arm']}`",
            Interval(**row["speedup"]).text(2, "×"),
            *(number(found[row["arm"], load]["speedup"]["estimate"]) for load in loads),
            _share(found[row["arm"], loads[0]].get("deciding")),
        ]
        for row in result["ranking"]
    ]
    heads = ["rank", "controller, tuned", "all loads", *map(str, loads), f"deciding at {loads[0]}"]
    return table(heads, rows) + _bound(result, loads)


def _bound(result: Result, loads: list[int]) -> str:
    """What the clairvoyant controller gains over the reference."""
    cells = [cell for cell in result["cells"] if cell["arm"].split(":")[0] == "oracle"]
    over = {cell["concurrency"]: cell["over_reference"] for cell in cells}
    if not over:
        return ""
    gains = ", ".join(f"{over[load]['estimate'] - 1:.0%}" for load in loads)
    return f"\nOver `{result['reference']}`, knowing what will be accepted gains {gains} at these loads.\n"


def ceiling(result: Result) -> str:
    """What fixed plans, fixed thresholds and foresight reach at each load."""
    loads = result["loads"]
    kinds = {"fixed": "fixed plan", "gated": "fixed gate and floor", "foresight": "foresight"}
    rows = [
        [
            str(cell["load"]),
            *(number(cell["over_plain"][kind]["estimate"]) for kind in kinds),
            *(Interval(**cell["over_fixed"][kind]).text(3, "×") for kind in ("gated", "foresight")),
        ]
        for cell in loads
    ]
    heads = ["in flight", *(f"{name}, over plain" for name in kinds.values())]
    gains = [
        geometric_mean([cell["over_fixed"][kind]["estimate"] for cell in loads]).estimate
        for kind in ("gated", "foresight")
    ]
    words = "\nOver the best fixed plan, all loads: gate and floor {:.3f}×, foresight {:.3f}×.\n".format(*gains)
    return table([*heads, "gate and floor over the plan", "foresight over the plan"], rows) + words


def ranking(result: Result) -> str:
    """Accepted tokens when nodes are ranked by the drafter's score, as learned, and at best."""
    found = result["ranking"]
    named = {"the drafter's score": "score", "learned": "learned"}
    rows = [[name, *(number(value) for value in found["accepted"][key])] for name, key in named.items()]
    rows.append(["what the target accepts", *(number(value) for value in found["most"])])
    losses = (f"{found['log_loss'][key]:.4f}" for key in named.values())
    words = "\nLog loss of a node's acceptance: {} by the score, {} as learned.\n".format(*losses)
    return table(["accepted a request, nodes ranked by", *(f"{count} nodes" for count in found["nodes"])], rows) + words


def winners(result: Result) -> str:
    """Who is fastest at each load."""
    rows = [
        [str(row["concurrency"]), f"`{row['arm']}`", ", ".join(f"`{arm}`" for arm in row["tied"]) or "-"]
        for row in result["winners"]
    ]
    return table(["in flight", "fastest", "not to be told from it"], rows)


def gates(result: Result) -> str:
    """ECHO with other gates and without its scheduler, over ECHO."""
    found, loads = result["gates"], sorted({cell["concurrency"] for cell in result["gates"]["cells"]})
    over = {(cell["arm"], cell["concurrency"]): cell["over_reference"]["estimate"] for cell in found["cells"]}
    rows = [
        [
            f"`{row['arm']}`",
            Interval(**row["over_reference"]).text(3, "×"),
            *(f"{over[row['arm'], load]:.3f}" for load in loads),
        ]
        for row in found["ranking"]
        if row["arm"] not in ("none", found["reference"])
    ]
    return table(["ECHO's decisions changed", "over `echo`", *map(str, loads)], rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
