"""Draw runs/<name>/curves.png from metrics.jsonl: reward, evaluation EM, searches per question, response length.

One run is drawn with its evaluation split by kind of question; several runs share the panels, one colour each.
Left out: anything interactive; TensorBoard has the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1_fast.files import whole_file
from searchr1_fast.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"

# Okabe and Ito's palette, which colour-blind readers can tell apart, also in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTHING = 0.8  # weight of the past in the exponential mean of a step's reward

Row = Mapping[str, Any]


def save_curves(run_dirs: str | Path | Sequence[str | Path], path: str | Path | None = None) -> Path | None:
    """Draw one run folder, or several together, into `path` (default: the first's curves.png). None: no rows yet."""
    folders = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(folder) for folder in run_dirs]
    runs = {str(folder): read_metrics(folder) for folder in folders}
    if not any(runs.values()):
        return None
    path = Path(path) if path is not None else folders[0] / CURVES_FILE
    figure = draw_curves({Path(name).resolve().name if len(runs) == 1 else name: rows for name, rows in runs.items()})
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
    return path


def draw_curves(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """The figure with its four panels; `runs` maps a name to its rows."""
    # Figure without pyplot: no global state, no display, safe in a thread and beside a user's own backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    panels = figure.subplots(2, 2)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(runs)}
    single = len(runs) == 1
    for name, rows in runs.items():
        label = None if single else name
        _steps(panels[0, 0], rows, "reward_mean", colours[name], label or "reward")
        _evaluations(panels[0, 1], rows, colours[name], label)
        _steps(panels[1, 0], rows, "searches_mean", colours[name], label or "training", smooth=False)
        _steps(panels[1, 1], rows, "response_tokens_mean", colours[name], label or "training", smooth=False)
        _eval_searches(panels[1, 0], rows, colours[name], single)
    _finish(panels[0, 0], "Reward", "mean reward of the step", bounded=True)
    _finish(panels[0, 1], "Evaluation EM", "exact match", bounded=True)
    _finish(panels[1, 0], "Searches", "searches per question")
    _finish(panels[1, 1], "Response length", "tokens after the prompt")
    figure.suptitle(next(iter(runs)) if single else "Runs compared", fontsize=12, fontweight="bold")
    return figure


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    pairs = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential mean, corrected for its start: the first value is the first value, not a pull towards zero."""
    total, norm, means = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1.0 - weight) * value
        norm = weight * norm + (1.0 - weight)
        means.append(total / norm)
    return means


def eval_sets(rows: Sequence[Row]) -> list[str]:
    """Names of the evaluation sets, in order of appearance."""
    return list(
        dict.fromkeys(match[1] for row in rows for key in row if (match := re.fullmatch(r"eval/([^/]+)/em", key)))
    )


def eval_kinds(rows: Sequence[Row], name: str) -> list[str]:
    """Kinds of question ("1-hop", …) that a set reports separately, sorted."""
    pattern = re.compile(rf"eval/{re.escape(name)}/(.+)/em")
    return sorted({match[1] for row in rows for key in row if (match := pattern.fullmatch(key))})


def _steps(axes: Axes, rows: Sequence[Row], key: str, colour: str, label: str, smooth: bool = True) -> None:
    steps, values = series(rows, key)
    if not steps:
        return
    if not smooth or len(steps) < 3:
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35)
    axes.plot(steps, smoothed(values), color=colour, linewidth=2.0, label=f"{label} (smoothed)")


def _evaluations(axes: Axes, rows: Sequence[Row], colour: str, label: str | None) -> None:
    """Draw the EM of every set; for a run drawn alone, also by kind of question."""
    names = eval_sets(rows)
    others = iter(COLOURS[1:] * 4)
    for index, name in enumerate(names):
        steps, values = series(rows, f"eval/{name}/em")
        line = colour if index == 0 or label is not None else next(others)
        text = " ".join(part for part in (label, name if len(names) > 1 else None) if part) or "overall"
        style = ("-", "--", ":")[index % 3] if label is not None else "-"
        axes.plot(steps, values, style, color=line, linewidth=2.4, marker="o", markersize=4, label=text)
        if label is not None:
            continue
        kinds = eval_kinds(rows, name)
        for kind in kinds if len(kinds) > 1 else ():  # the only kind is the set itself
            steps, values = series(rows, f"eval/{name}/{kind}/em")
            text = f"{name} {kind}" if len(names) > 1 else kind
            axes.plot(steps, values, "--", color=next(others), linewidth=1.3, marker="o", markersize=3, label=text)


def _eval_searches(axes: Axes, rows: Sequence[Row], colour: str, single: bool) -> None:
    for name in eval_sets(rows)[:1]:
        steps, values = series(rows, f"eval/{name}/searches_mean")
        if steps:
            label = "evaluation" if single else None
            line = COLOURS[1] if single else colour
            axes.plot(steps, values, ":", color=line, linewidth=1.5, marker="o", markersize=3.5, label=label)


def _finish(axes: Axes, title: str, ylabel: str, bounded: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#888888")
        return
    if bounded:
        low, high = (min(0.0, axes.dataLim.y0), max(1.0, axes.dataLim.y1))
        axes.set_ylim(low - 0.03, high + 0.03)
    else:
        axes.set_ylim(bottom=min(0.0, axes.dataLim.y0), top=max(axes.dataLim.y1 * 1.08, 1e-9))
    if any(not line.get_label().startswith("_") for line in axes.lines):
        axes.legend(fontsize=8, frameon=False)
