"""`searchr1 ask`: ask one question; show the whole transcript in colour, and the answer.

A model that a run wrote is asked with that run's own prompt and limits; any other with the defaults.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_fast.cli import add_model_argument, command_parser, model_directory, run_config_path
from searchr1_fast.config import Config, WorldConfig, load_config
from searchr1_fast.console import Console, visible
from searchr1_fast.errors import entry_point

if TYPE_CHECKING:
    from searchr1_fast.evaluate import Score
    from searchr1_fast.retrieval import Retriever
    from searchr1_fast.types import Question


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, show how the model got there, print the answer on the last line."""
    arguments = _parser().parse_args(argv)
    if arguments.question is None and not arguments.world:
        raise ValueError("there is no question; put it in quotes at the end (only --world has questions of its own)")
    model = model_directory(arguments.model or "builtin:base")
    config = _config(model, arguments)
    if arguments.world:
        question, retriever = _from_world(config, arguments)
    else:
        question, retriever = _from_user(config, arguments)
    score = _ask(config, model, question, retriever, arguments)
    ui = Console()
    ui.trajectory(score.trajectory)
    answer = "no answer" if score.prediction is None else f"answer: {score.prediction}"
    ui.rich.print(visible(answer), style="bold", soft_wrap=True)
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "ask",
        "searchr1 ask --model runs/demo --world\n"
        'searchr1 ask --model runs/demo --corpus corpus.jsonl "Who founded the town where Ann was born?"\n'
        'searchr1 ask --model path/to/model --url http://127.0.0.1:8000/retrieve "Who wrote Faust?"',
    )
    parser.add_argument("question", nargs="?", help="in quotes; with --world a question of that world if left out")
    add_model_argument(parser, "builtin:base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", metavar="FILE", type=Path, help="search this JSONL of passages with BM25")
    source.add_argument("--url", help="search a server that speaks Search-R1's /retrieve protocol")
    source.add_argument("--world", action="store_true", help="search a generated encyclopedia, of the evaluation split")
    parser.add_argument("--number", metavar="N", type=int, default=0, help="which question of the world (default: 0)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, with a temperature (default: 0)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting: rollout.max_searches=6"
    )
    return parser


def _config(model: Path | str, arguments: Namespace) -> Config:
    """The configuration of the model's run, if it comes from one, with the retriever that was asked for. A world is
    searched as the run searched its own, if that was by BM25 or by vectors without an index."""
    overrides = []
    own = load_config(run_config_path(model)).retrieval
    searches_passages = own.backend == "bm25" or (own.backend == "dense" and own.index is None)
    if arguments.corpus is not None or (arguments.world and not searches_passages):
        overrides.append("retrieval.backend=bm25")
    elif arguments.url is not None:
        overrides += ["retrieval.backend=remote", f"retrieval.url={arguments.url}"]
    overrides += [*arguments.set, f"eval.temperature={arguments.temperature}"]
    return load_config(run_config_path(model), overrides)


def _from_world(config: Config, arguments: Namespace) -> tuple[Question, Retriever]:
    """A question of the run's evaluation world, or the user's own about it, and a retriever over its corpus."""
    from searchr1_fast.retrieval import open_retriever
    from searchr1_fast.world import build_world

    worlds = [data.world for data in config.eval.sets.values() if data.world is not None]
    world = build_world(worlds[0] if worlds else WorldConfig(split="eval"))
    retriever = open_retriever(config.retrieval, world.passages)
    if arguments.question is None:
        if not 0 <= arguments.number < len(world.questions):
            raise ValueError(f"--number {arguments.number}: this world has questions 0 to {len(world.questions) - 1}")
        return world.questions[arguments.number], retriever
    known = {question.text: question for question in world.questions}
    return known.get(arguments.question) or _question(arguments.question), retriever


def _from_user(config: Config, arguments: Namespace) -> tuple[Question, Retriever]:
    from searchr1_fast.retrieval import open_retriever

    return _question(arguments.question), open_retriever(config.retrieval, arguments.corpus)


def _question(text: str) -> Question:
    """A question without golden answers."""
    from searchr1_fast.types import Question

    if not text.strip():
        raise ValueError("the question is empty")
    return Question("ask", text.strip(), (), "ask")


def _ask(
    config: Config, model_path: Path | str, question: Question, retriever: Retriever, arguments: Namespace
) -> Score:
    """Ask the model."""
    import torch

    from searchr1_fast.distributed import process
    from searchr1_fast.environment import Environment
    from searchr1_fast.evaluate import evaluate
    from searchr1_fast.models import load_model, load_tokenizer, resolve

    directory = resolve(model_path, or_adapter=True)
    with process(config.run.device, config.run.num_threads, arguments.seed) as ranks, ExitStack() as stack:
        model = load_model(directory, getattr(torch, config.model.dtype), ranks.device).eval()
        environment = Environment([question], retriever, config.retrieval.topk, config.retrieval.max_retries)
        stack.callback(environment.close)
        tokenizer = load_tokenizer(directory, for_chat=config.prompt.chat_template)
        result = evaluate(model, tokenizer, environment, config, name="ask", seed=arguments.seed)
    return result.scores[0]


if __name__ == "__main__":
    sys.exit(main())
