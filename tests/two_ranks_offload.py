"""Started by test_offload.py and others on two ranks: `two_ranks_offload.py CONFIG…` trains each as if on a GPU."""

from __future__ import annotations

import sys

from searchr1_fast import policy
from searchr1_fast.config import load_config
from searchr1_fast.console import Console
from searchr1_fast.distributed import process
from searchr1_fast.models import Decoder
from searchr1_fast.train import train


def main() -> None:
    """Train each configuration; the runs' folders are the output."""
    policy.leaves = lambda device: True
    Decoder.fused_generation = False  # its loops view weights through numpy, which pins their memory
    with process("cpu", num_threads=1):
        for path in sys.argv[1:]:
            train(load_config(path), Console(quiet=True))


if __name__ == "__main__":
    main()
