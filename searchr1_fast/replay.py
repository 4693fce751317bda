"""`searchr1 replay FILE`: recompute an update that was not finite, and say where it stopped being finite.

`--dtype float32` shows whether the type causes it, `--model` whether it also happens with other weights.
examination.py does the checking.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from searchr1_fast.cli import command_parser
from searchr1_fast.console import make_console, visible
from searchr1_fast.errors import entry_point

if TYPE_CHECKING:
    from searchr1_fast.examination import Finding

NOT_REPEATED = 1  # exit code where everything is finite


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for every micro-batch and what was found first; exit code 1 if everything is finite."""
    parser = command_parser(
        "replay",
        "searchr1 replay runs/demo/bad_steps/step_000012_policy_0.pt\n"
        "searchr1 replay runs/demo/bad_steps/step_000012_policy_0.pt --dtype float32\n"
        "searchr1 replay runs/demo/bad_steps/step_000012_policy_0.pt --model runs/demo/checkpoints/step_000010",
        "Exit code 1: everything is finite this time.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="an update that a run kept, <run>/bad_steps/step_*.pt")
    parser.add_argument("--model", metavar="DIR", help="the policy's weights (default: those kept beside the update)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    return replay(arguments.file, arguments.model, arguments.dtype, arguments.device)


def replay(path: Path, model: str | None = None, dtype: str | None = None, device: str = "auto") -> int:
    """-> `main`'s exit code. ValueError if the update or its weights are not there."""
    import yaml  # imported here, because torch takes seconds and `--help` should not wait for it

    from searchr1_fast.bad_updates import read_bad_update
    from searchr1_fast.config import Config
    from searchr1_fast.distributed import process
    from searchr1_fast.examination import examine, load_learner, written_up_to

    update = read_bad_update(path)
    config = Config.model_validate(yaml.safe_load(update.config))
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    say(
        f"step {update.step}, minibatch {update.minibatch + 1} of the {update.learner}, after {update.num_updates} "
        f"updates; then: {update.diagnosis}"
    )
    with process(device, config.run.num_threads, config.run.seed) as ranks:
        module = load_learner(update, config, path.parent, model, dtype or config.model.dtype, ranks.device)
        findings = [examine(module, update, config, place, ranks.device) for place in range(len(update.micro_batches))]
        bad_weights = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    console.print(findings_table(findings))
    if bad_weights:
        say(f"the weights are not finite: {len(bad_weights)} parameters, the first {bad_weights[0]}")
    bad = [finding for finding in findings if finding.found]
    for finding in bad:
        say(f"micro-batch {finding.place}, rank {finding.rank}: {'; '.join(finding.found)}")
    if bad and bad[0].token is not None:
        text = written_up_to(update.micro_batches[bad[0].place], bad[0].token, config)
        say(visible(f"what the policy wrote up to there: {text}"))
    if not bad and not bad_weights:
        say("everything is finite this time: the sum of all, another type, another device or other weights made it")
        return NOT_REPEATED
    return 0


def findings_table(findings: Sequence[Finding]) -> Table:
    """A row per micro-batch."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("micro-batch", "rank", "tokens", "policy tokens", "loss", "gradient norm", "largest |log ratio|"):
        table.add_column(title, justify="right")
    table.add_column("not finite, first")
    for finding in findings:
        counts = (finding.place, finding.rank, finding.num_tokens, finding.num_policy_tokens)
        values = (finding.loss, finding.grad_norm, finding.log_ratio)
        numbers = ("-" if value is None else f"{value:.4g}" for value in values)
        first = Text(finding.found[0] if finding.found else "", style="bold red")
        table.add_row(*map(str, counts), *numbers, first)
    return table


if __name__ == "__main__":
    sys.exit(main())
