"""`searchr1 pretrain-base`: the command line of pretraining.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from searchr1_fast.cli import command_parser
from searchr1_fast.errors import entry_point


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, then import what takes seconds."""
    parser = command_parser(
        "pretrain-base",
        "searchr1 pretrain-base --variant stem --output models/stem\n"
        "searchr1 pretrain-base --variant reader --from models/stem --output models/reader\n"
        "searchr1 pretrain-base --variant base --from models/reader --output models/base\n"
        "searchr1 pretrain-base --variant instruct --from models/base --output models/instruct",
        "Goes on from OUTPUT/state.pt where an earlier call was stopped.",
    )
    parser.add_argument("--variant", choices=("stem", "reader", "base", "instruct"), required=True, help="which recipe")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the model's directory")
    parser.add_argument("--from", dest="start", metavar="DIR", type=Path, help="what the variant before it became")
    parser.add_argument("--steps", metavar="N", type=int, help="instead of the recipe's number of steps")
    arguments = parser.parse_args(argv)
    if (arguments.variant == "stem") != (arguments.start is None):
        parser.error("--variant reader, base and instruct go on --from a model, and stem begins anew")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error("--steps: at least 1")

    from dataclasses import replace

    from searchr1_fast.distributed import process
    from searchr1_fast.pretraining import RECIPES, pretrain

    recipe = RECIPES[arguments.variant]
    recipe = recipe if arguments.steps is None else replace(recipe, num_steps=arguments.steps)
    with process("cpu", seed=recipe.seed) as ranks:
        pretrain(arguments.variant, arguments.output, recipe, arguments.start, ranks=ranks)


if __name__ == "__main__":
    sys.exit(main())
