"""`searchr1 report RUN_DIR …`: print a table of what runs reached and what they cost, and redraw their curves.

It reads only metrics.jsonl, so it works on a run that is still going, or whose machine is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from searchr1_fast.cli import command_parser
from searchr1_fast.console import make_console, time_shares, visible
from searchr1_fast.curves import eval_kinds, eval_sets, save_curves, series
from searchr1_fast.errors import entry_point
from searchr1_fast.metrics import read_metrics

WINDOW = 10  # steps in the mean of a "start" and an "end"; half of all steps if there are fewer than twice as many

Row = Mapping[str, Any]


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of the runs and redraw their curves."""
    parser = command_parser(
        "report", "searchr1 report runs/demo\nsearchr1 report runs/grpo runs/ppo --output comparison.png"
    )
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+", help="run folders, such as runs/demo")
    parser.add_argument("--output", metavar="FILE", type=Path, help="draw all the runs into one picture")
    arguments = parser.parse_args(argv)
    runs = {str(folder): read_metrics(folder) for folder in arguments.runs}
    console = make_console()
    console.print(summary_table(runs))
    for folder in arguments.runs:
        path = save_curves(folder)
        console.print(
            f"{visible(str(folder))}: " + (f"curves in {path}" if path else "no rows yet, no curves"), soft_wrap=True
        )
    if arguments.output is not None:
        if save_curves(arguments.runs, arguments.output) is None:
            raise ValueError(f"{arguments.output} not drawn: the runs have no rows yet")
        console.print(f"comparison in {arguments.output}", soft_wrap=True)
    return 0


def summary_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """One column per run, one line per number; lines that no run has are left out."""
    summaries = {name: summarise(rows) for name, rows in runs.items()}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in summaries:
        table.add_column(Text(visible(name)), justify="right", overflow="fold")
    for key in dict.fromkeys(key for summary in summaries.values() for key in summary):
        table.add_row(Text(visible(key)), *(Text(summary.get(key, "-")) for summary in summaries.values()))
    return table


def summarise(rows: Sequence[Row]) -> dict[str, str]:
    """Label → text: evaluation from first to last, the training signal, speed and where the time went."""
    summary = {"steps": str(max((row["step"] for row in rows), default=0))}
    for name in eval_sets(rows):
        for kind in ["", *eval_kinds(rows, name)]:
            prefix = f"eval/{name}/{kind}/" if kind else f"eval/{name}/"
            label = f"eval {name} {kind}".rstrip()
            summary[f"{label} EM"] = _first_to_last(rows, f"{prefix}em", 3)
        best_steps, best = series(rows, f"eval/{name}/em")
        top = max(range(len(best)), key=best.__getitem__)
        summary[f"eval {name} best EM"] = f"{best[top]:.3f} at step {best_steps[top]}"
        if series(rows, f"eval/{name}/searches_mean")[1]:
            summary[f"eval {name} searches"] = _first_to_last(rows, f"eval/{name}/searches_mean", 2)
    for label, key, digits in (
        ("reward", "reward_mean", 3),
        ("searches per question", "searches_mean", 2),
        ("response tokens", "response_tokens_mean", 0),
    ):
        values = series(rows, key)[1]
        if values:
            window = min(WINDOW, max(1, len(values) // 2))
            start, end = _mean(values[:window]), _mean(values[-window:])
            summary[f"{label}, start → end"] = f"{start:.{digits}f} → {end:.{digits}f}"
    return summary | _cost(rows)


def _cost(rows: Sequence[Row]) -> dict[str, str]:
    cost = {}
    seconds = series(rows, "time_step")[1]
    if seconds:
        cost["training time"] = _duration(sum(seconds))
        cost["seconds per step"] = f"{_mean(seconds):.2f}"
    for label, key in (
        ("trajectories per second", "trajectories_per_second"),
        ("tokens per second", "tokens_per_second"),
    ):
        values = series(rows, key)[1]
        if values:
            cost[label] = f"{_mean(values):,.1f}"
    keys = ("time_step", "time_rollout", "time_search_wait", "time_ref", "time_update")
    totals = {key: sum(series(rows, key)[1]) for key in keys}
    shares = time_shares(totals)
    if shares:
        cost["time in"] = ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
    return cost | _searches(rows)


def _searches(rows: Sequence[Row]) -> dict[str, str]:
    """How many queries a step has, how few of them are searched, and how long each is waited for."""
    total = {key: sum(series(rows, f"search/{key}")[1]) for key in _SEARCH_COUNTS}
    steps = len(series(rows, "search/queries")[1])
    if not total["queries"]:
        return {}
    searched, cached = (total[key] / total["queries"] for key in ("unique", "cache_hits"))
    shared = max(0.0, 1.0 - searched - cached)  # with an equal query at the same time
    lines = {
        "queries per step": f"{total['queries'] / steps:,.1f}",
        "of these searched, cached, shared": f"{searched:.0%}, {cached:.0%}, {shared:.0%}",
    }
    means = [series(rows, f"search/wait_p{percent}")[1] for percent in (50, 99)]
    if all(means):
        lines["wait of a query, p50, p99"] = ", ".join(f"{_mean(values) * 1e3:,.1f} ms" for values in means)
    if total["timeouts"] or total["retries"]:
        lines["searches late, tried again"] = f"{total['timeouts']:.0f}, {total['retries']:.0f}"
    return lines


_SEARCH_COUNTS = ("queries", "unique", "cache_hits", "timeouts", "retries")


def _first_to_last(rows: Sequence[Row], key: str, digits: int) -> str:
    values = series(rows, key)[1]
    if not values:
        return "-"
    return f"{values[0]:.{digits}f} → {values[-1]:.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
