"""`searchr1 eval`: score a model on the evaluation sets of a configuration, by kind of question and by source.

The arithmetic is evaluate.py's; this is the command around it. Under torchrun the ranks share the questions.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1_fast.cli import add_config_arguments, add_model_argument, command_parser, model_directory
from searchr1_fast.config import Config, load_config
from searchr1_fast.console import Console, scores_table, sets_table
from searchr1_fast.errors import entry_point
from searchr1_fast.files import write_jsonl

if TYPE_CHECKING:
    from searchr1_fast.distributed import Ranks
    from searchr1_fast.environment import Environment
    from searchr1_fast.evaluate import EvalResult


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every set, print a table of each and one of all, and write the answers where asked."""
    arguments = _parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.temperature is not None:
        if arguments.temperature < 0:
            raise ValueError(f"--temperature {arguments.temperature}: give 0 (greedy) or more")
        overrides.append(f"eval.temperature={arguments.temperature}")
    config = load_config(arguments.config, overrides)
    names = _chosen_sets(config, arguments.sets)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after an hour of answers
    model = model_directory(arguments.model or config.model.path)
    results = _evaluate(config, names, model)
    if arguments.output is not None and results:
        write_jsonl(arguments.output, (row for result in results for row in _answers(result)))
        Console().note(f"answers in {arguments.output}")
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "eval",
        "searchr1 eval configs/demo.yaml\n"
        "searchr1 eval configs/demo.yaml --model runs/demo --output answers.jsonl\n"
        "searchr1 eval configs/demo.yaml --model runs/demo --temperature 1.0 eval.sets.unseen.world.seed=7\n"
        "torchrun --nproc-per-node 8 -m searchr1_fast.eval configs/demo.yaml --model runs/demo",
        "Exact match comes with its 95 % interval.",
    )
    add_config_arguments(parser)
    add_model_argument(parser, "the configuration's model.path")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: eval.temperature)")
    parser.add_argument(
        "--sets", metavar="NAME", nargs=1, action="extend", help="only this one of eval.sets; repeatable"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write every answer and trajectory as JSONL")
    return parser


def _chosen_sets(config: Config, chosen: Sequence[str] | None) -> list[str]:
    """Names of the sets to evaluate. ValueError for one that does not exist."""
    known = ", ".join(config.eval.sets)
    if not known:
        raise ValueError("the configuration has no eval.sets; add one, for example eval.sets.unseen.world.split=eval")
    for name in chosen or ():
        if name not in config.eval.sets:
            raise ValueError(f"--sets {name}: the configuration's eval.sets are {known}")
    return list(chosen or config.eval.sets)


def _evaluate(config: Config, names: list[str], model_path: Path | str) -> list[EvalResult]:
    """Run the sets in turn on every rank, printing on rank 0; return the results there."""
    import torch

    from searchr1_fast.distributed import process
    from searchr1_fast.evaluate import build_engine, evaluate
    from searchr1_fast.models import load_model, load_tokenizer, resolve

    directory = resolve(model_path, or_adapter=True)
    with process(config.run.device, config.run.num_threads, config.run.seed) as ranks, ExitStack() as stack:
        ui = Console(quiet=not ranks.is_main)
        environments = _environments(config, names, ranks, ui)
        for environment in environments.values():
            stack.callback(environment.close)
        model = load_model(directory, getattr(torch, config.model.dtype), ranks.device).eval()
        tokenizer = load_tokenizer(directory, for_chat=config.prompt.chat_template)
        engine = build_engine(model, tokenizer, config)  # one for all sets: vLLM is slow to start
        stack.callback(engine.close)
        results = []
        for name, environment in environments.items():
            mine = len(ranks.share(environment.questions))
            with ui.phase(f"eval {name}", mine) as progress:
                result = evaluate(
                    model, tokenizer, environment, config,
                    name=name, engine=engine, ranks=ranks, progress=progress,
                )  # fmt: skip
            ui.rich.print(scores_table(name, result.metrics()))
            results.append(result)
        if len(results) > 1:
            ui.rich.print(sets_table({result.name: result.metrics() for result in results}))
        return results if ranks.is_main else []


def _environments(
    config: Config, names: list[str], ranks: Ranks | None = None, ui: Console | None = None
) -> dict[str, Environment]:
    """Build the chosen sets. The training corpus is opened only if a set of questions has none of its own."""
    from searchr1_fast.environment import build_environment, evaluation_environments

    sets = {name: config.eval.sets[name] for name in names}
    lacking = any(data.world is None and data.corpus is None for data in sets.values())
    shared = None
    if lacking and config.retrieval.backend in ("bm25", "dense"):
        shared = build_environment(config.data, config.retrieval, ranks=ranks, ui=ui).retriever
    chosen = config.model_copy(update={"eval": config.eval.model_copy(update={"sets": sets})})
    return evaluation_environments(chosen, shared, ranks, ui)


def _answers(result: EvalResult) -> list[Mapping[str, Any]]:
    """A row per question: what it scored, and the text of its trajectory."""
    return [
        {"set": result.name} | score.record() | {"segments": [list(part) for part in score.trajectory.segments]}
        for score in result.scores
    ]


if __name__ == "__main__":
    sys.exit(main())
