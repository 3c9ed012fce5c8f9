"""Tables of GPUs that were modelled, not measured."""

from __future__ import annotations

from benchmarks.tables.markdown import Result, number, table


def modelled(result: Result) -> str:
    """Modelled speed-ups over plain decoding: a row per machine and controller, a column a batch size."""
    cells = [(name, cell) for name, machine in result["machines"].items() for cell in machine["cells"]]
    loads = sorted({cell["concurrency"] for _, cell in cells})
    found = {(name, cell["arm"], cell["concurrency"]): cell for name, cell in cells}
    arms = dict.fromkeys((name, cell["arm"]) for name, cell in cells if cell["arm"] != result["baseline"])
    rows = []
    for name, arm in arms:
        last = found[name, arm, loads[-1]]["over_eagle3"]["estimate"]
        speeds = (number(found[name, arm, load]["speedup"]["estimate"]) for load in loads)
        rows.append([name, f"`{arm}`", *speeds, f"{last - 1:+.1%}"])
    heads = ["modelled, not measured", "controller", *map(str, loads), f"over `eagle3 5/3/3` at {loads[-1]}"]
    return table(heads, rows) + f"\nAcceptance: {result['trace']}. Costs: a roofline; no GPU was used.\n"


def modelled_break_even(result: Result) -> str:
    """Tokens a request and step at which EAGLE-3's light tree is as fast as plain decoding, with any drafter."""
    rows = [[name, *map(number, points.values())] for name, points in result["break_even"].items()]
    return table(["modelled, not measured", *next(iter(result["break_even"].values()))], rows)
