"""What a person sees of a run: progress bars while a phase runs, one line per step, tables, coloured trajectories.

On a terminal the bars are live and leave no trace; a file or a CI log gets plain lines only, with a sign of life in
long phases. Model output is arbitrary text: it is never read as markup, and control characters are shown, not obeyed.
Numbers come from the metrics rows; nothing is computed here that metrics.jsonl lacks.
Left out: a full-screen display. A log that scrolls can be copied into a bug report.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import rich.console
from rich import box
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from searchr1_fast.types import Progress, Trajectory

PLAIN_WIDTH = 120  # of tables that go into a file, where there is no window to measure
SIGN_OF_LIFE_SECONDS = 20.0  # between the plain lines of one long phase

_TAG = re.compile(r"</?(?:think|search|information|answer)>")
_ACTION = re.compile(r"(<(search|answer)>)(.*?)(</\2>)", re.DOTALL)
# ESC and its kin would move the cursor or recolour the terminal; show their Unicode pictures. Newline and tab stay.
_CONTROL = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROL |= dict.fromkeys(range(128, 160), 65533)


class Console:
    """The display of one run. `quiet`: prints nothing, for the ranks that are not the first."""

    def __init__(self, num_steps: int = 0, quiet: bool = False, file: IO[str] | None = None) -> None:
        self.num_steps = num_steps
        self.quiet = quiet
        self.rich = make_console(file, quiet)

    def note(self, text: str) -> None:
        """One line of plain text."""
        self.rich.print(Text(visible(text)), soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Progress]:
        """Show a phase while it runs; yields `progress(finished, total)`, which a rollout calls as it goes."""
        if self.quiet:
            yield lambda finished, total: None
        elif self.rich.is_terminal:
            # markup=False: a set's name may hold brackets, and a description is read as markup unless told otherwise
            label = TextColumn("  {task.description}", style="dim", markup=False)
            columns = (label, BarColumn(32), MofNCompleteColumn(), TimeElapsedColumn())
            with ProgressBar(*columns, console=self.rich, transient=True, refresh_per_second=5) as bar:
                task = bar.add_task(visible(name), total=total)
                yield lambda finished, total: bar.update(task, completed=finished, total=total)
        else:
            yield _SignOfLife(name, self.note)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One line: how far, how good, what the policy does, how fast, and where the time went."""
        self.rich.print(step_line(metrics, self.num_steps), soft_wrap=True)

    def evaluation(self, name: str, metrics: Mapping[str, Any]) -> None:
        """One line: EM with its interval, by kind of question, and searches. `metrics` without `eval/<name>/`."""
        line = Text().append(f"  eval {visible(name)}  ", style="magenta")
        line.append(f"EM {_number(metrics.get('em'), 3)}", style="bold").append(_interval(metrics))
        for kind in kinds(metrics):
            line.append(f"  {visible(kind)} ", style="dim").append(_number(metrics.get(f"{kind}/em"), 2))
        line.append("  searches ", style="dim").append(_number(metrics.get("searches_mean"), 2))
        self.rich.print(line, soft_wrap=True)

    def final(
        self,
        before: Mapping[str, Mapping[str, Any]],
        after: Mapping[str, Mapping[str, Any]],
        examples: tuple[Trajectory, Trajectory] | None = None,
    ) -> None:
        """The table of before and after, by set and kind, then a question answered wrongly before and rightly after."""
        if self.quiet:
            return
        self.rich.print()
        for name in after:
            self.rich.print(before_after_table(name, before.get(name, {}), after[name]))
        if examples is not None:
            for title, trajectory in zip(("before", "after"), examples, strict=True):
                self.trajectory(trajectory, title)

    def trajectory(self, trajectory: Trajectory, title: str = "") -> None:
        """A whole trajectory, coloured by who wrote what, with the verdict under it."""
        golden = trajectory.question.golden_answers
        right = trajectory.reward > 0 if golden else None  # a question from outside has no answer to compare with
        question = visible(trajectory.question.text)
        self.rich.print(Rule(Text(f"{visible(title)}: {question}" if title else question), style="dim", align="left"))
        self.rich.print(Padding(transcript(trajectory.segments, correct=right), (0, 2)))
        verdict = Text("  ")
        if right is not None:
            verdict.append("right" if right else "wrong", style="bold green" if right else "bold red")
            verdict.append(f"  expected: {visible(' | '.join(golden))}  ", style="dim")
        verdict.append(f"searches: {trajectory.num_searches}  ended: {trajectory.finish_reason.value}", style="dim")
        self.rich.print(verdict, soft_wrap=True)


class _SignOfLife:
    """The plain twin of a progress bar: a line now and then, none for a phase that is soon over."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._next = time.monotonic() + SIGN_OF_LIFE_SECONDS

    def __call__(self, finished: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SIGN_OF_LIFE_SECONDS
            self._say(f"  {self._name}: {finished} of {total}")


def make_console(file: IO[str] | None = None, quiet: bool = False) -> rich.console.Console:
    """A rich console that cannot fail on a character: what the stream's encoding lacks is printed as `?`."""
    stream = file if file is not None else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    console = rich.console.Console(file=file, quiet=quiet, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = rich.console.Console(
            file=file, quiet=quiet, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, no_color=True
        )
    return console


def visible(text: str) -> str:
    """Text that prints as itself: control characters as pictures, lone surrogates as `?`."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROL)


def transcript(segments: Sequence[tuple[str, str]], correct: bool | None = None) -> Text:
    """Segments in colour: prompt and observation dim, tags bold, the last answer green or red. None: not judged."""
    answer_style = {True: "bold green", False: "bold red", None: "bold"}[correct]
    answers = [
        (index, match.start())
        for index, (kind, text) in enumerate(segments)
        if kind == "policy"
        for match in _ACTION.finditer(visible(text))
        if match[2] == "answer"
    ]
    result = Text()
    for index, (kind, text) in enumerate(segments):
        if kind != "policy":
            result.append(visible(text), style="dim" if kind == "prompt" else "dim blue")
            continue
        piece = Text(visible(text))
        for match in _ACTION.finditer(piece.plain):
            last = answers[-1:] == [(index, match.start())]
            style = "cyan" if match[2] == "search" else answer_style if last else "bold"
            piece.stylize(style, match.start(3), match.end(3))
        piece.highlight_regex(_TAG, style="bold yellow")
        result.append_text(piece)
    return result


def step_line(metrics: Mapping[str, Any], num_steps: int) -> Text:
    """The line of one step."""
    width = len(str(num_steps))
    line = Text().append(f"step {metrics['step']:>{width}}/{num_steps}", style="bold")
    for label, key, digits, style in (
        ("reward", "reward_mean", 3, "bold green"),
        ("EM", "em", 3, ""),
        ("searches", "searches_mean", 2, "cyan"),
        ("length", "response_tokens_mean", 0, ""),
    ):
        line.append(f"  {label} ", style="dim").append(_number(metrics.get(key), digits), style=style)
    line.append("  ").append(_thousands(metrics.get("tokens_per_second"))).append(" tok/s", style="dim")
    line.append(f"  {_number(metrics.get('time_step'), 1)}s", style="bold")
    for phase, share in time_shares(metrics).items():
        line.append(f"  {phase} ", style="dim").append(f"{share:.0%}")
    for label, key in (
        ("searches late", "search/timeouts"),
        ("tried again", "search/retries"),
        ("pages unread", "search/page_failures"),
    ):
        if metrics.get(key):
            line.append(f"  {label} {metrics[key]:.0f}", style="bold red")
    return line


def time_shares(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Where a step's time went, as shares that add up to 1. The rollout's share is without its wait for searches."""
    total = metrics.get("time_step") or 0.0
    if total <= 0:
        return {}
    seconds = {phase: metrics.get(f"time_{phase}") or 0.0 for phase in ("rollout", "search_wait", "ref", "update")}
    search = min(seconds["search_wait"], seconds["rollout"])
    shares = {
        "rollout": (seconds["rollout"] - search) / total,
        "search": search / total,
        "update": (seconds["ref"] + seconds["update"]) / total,
    }
    return shares | {"other": max(0.0, 1.0 - sum(shares.values()))}


def kinds(metrics: Mapping[str, Any]) -> list[str]:
    """Kinds of question that an evaluation reports separately ("1-hop", …), sorted."""
    return sorted(key.removesuffix("/em") for key in metrics if key.endswith("/em"))


def before_after_table(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """EM with 95 % intervals and searches, by kind of question, before and after."""
    table = Table(
        title=Text(f"{visible(name)}: before and after", style="bold"), box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("questions")
    table.add_column("n", justify="right", style="dim")
    for when in ("before", "after"):
        table.add_column(f"EM {when}", justify="right", no_wrap=True)
        table.add_column("searches", justify="right", style="cyan")
    table.add_column("change", justify="right")
    for kind in ["", *kinds(after)]:
        prefix = f"{kind}/" if kind else ""
        old, new = ({key: side.get(f"{prefix}{key}") for key in _ROW_KEYS} for side in (before, after))
        cells: list[str | Text] = [Text(visible(kind) or "all", style="" if kind else "bold"), _number(new["count"], 0)]
        for scores in (old, new):
            em = Text().append(_number(scores["em"], 3), style="bold").append(_interval(scores))
            cells += [em, _number(scores["searches_mean"], 2)]
        table.add_row(*cells, _change(old["em"], new["em"]))
    return table


def scores_table(name: str, metrics: Mapping[str, Any]) -> Table:
    """Every score of one evaluation, by kind of question and source."""
    table = Table(title=Text(visible(name), style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("questions")
    for title in ("n", "EM [95 %]", "sub-EM", "F1", "searches", "response tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for kind in ["", *kinds(metrics)]:
        row = {
            key.removeprefix(f"{kind}/"): value
            for key, value in metrics.items()
            if not kind or key.startswith(f"{kind}/")
        }
        table.add_row(
            Text(visible(kind) or "all", style="" if kind else "bold"),
            Text(_number(row.get("count"), 0), style="dim"),
            Text().append(_number(row.get("em"), 3), style="bold").append(_interval(row)),
            *(_number(row.get(key), 3) for key in ("sub_em", "f1")),
            Text(_number(row.get("searches_mean"), 2), style="cyan"),
            _number(row.get("response_tokens_mean"), 0),
        )
    return table


def sets_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per evaluation set, and their unweighted mean: the form of the published tables."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("set")
    for title in ("n", "EM [95 %]", "sub-EM", "F1", "searches"):
        table.add_column(title, justify="right", no_wrap=True)
    keys = ("em", "sub_em", "f1", "searches_mean")
    mean = {key: sum(row[key] for row in metrics.values()) / len(metrics) for key in keys}
    for name, row in (*metrics.items(), ("mean of the sets", mean)):
        table.add_row(
            Text(visible(name), style="bold" if row is mean else ""),
            Text("" if row is mean else _number(row.get("count"), 0), style="dim"),
            Text().append(_number(row["em"], 3), style="bold").append(_interval(row)),
            *(_number(row[key], 3) for key in ("sub_em", "f1")),
            Text(_number(row["searches_mean"], 2), style="cyan"),
        )
    return table


_ROW_KEYS = ("em", "em_low", "em_high", "searches_mean", "count")


def _change(before: Any, after: Any) -> Text:
    if before is None or after is None:
        return Text("-", style="dim")
    return Text(
        f"{after - before:+.3f}", style="bold green" if after > before else "bold red" if after < before else ""
    )


def _interval(scores: Mapping[str, Any]) -> Text:
    """` [0.21, 0.28]`, or nothing where there is no interval."""
    low, high = scores.get("em_low"), scores.get("em_high")
    return Text("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]", style="dim")


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _thousands(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
