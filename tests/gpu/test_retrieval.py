"""Dense retrieval on a GPU finds what it finds on the CPU, with the same bits of scores."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from commands import environment

from searchr1_fast.config import RetrievalConfig, WorldConfig
from searchr1_fast.retrieval import open_retriever
from searchr1_fast.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("scan", ["float16", "int8"])
def test_hits_are_those_of_the_cpu(scan):
    world = World(WorldConfig(num_entities=300, num_questions=100))
    queries = [chain.question.text for chain in world.chains()] + ["", "nothing like it"]
    found = []
    for device in ("cpu", "cuda"):
        config = RetrievalConfig(backend="dense", device=device, scan=scan, hashing_dimension=512)
        retriever = open_retriever(config, world.passages)
        try:
            found.append([retriever.search(queries, 5), [retriever.search([query], 5)[0] for query in queries[:5]]])
        finally:
            retriever.close()
    for one, other in zip(*(results[0] for results in found), strict=True):
        assert [(hit.id, hit.score) for hit in one] == [(hit.id, hit.score) for hit in other]
    assert found[1][0][:5] == found[1][1]  # alone as in a batch


SECOND_RANK = """
import sys
import torch
from searchr1_fast.config import RetrievalConfig, WorldConfig
from searchr1_fast.retrieval import open_retriever
from searchr1_fast.world import World

device = sys.argv[1]
if device == "cuda":
    torch.cuda.set_device(1)
world = World(WorldConfig(num_entities=60, num_questions=9))
retriever = open_retriever(RetrievalConfig(backend="dense", device=device, hashing_dimension=64), world.passages)
assert retriever.search(["nothing like it"], 3)
retriever.park(), retriever.unpark()
assert retriever.search(["nor like this"], 3)
retriever.close()
assert [torch._C._cuda_hasPrimaryContext(device) for device in (1, 0)] == [True, False]
"""


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])  # a rank's own, and that of a server that is told which
def test_a_rank_that_searches_opens_no_other_gpu(device):
    """Its threads start with the first GPU, where every rank would take memory for a context."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-c", SECOND_RANK, device]
    done = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
