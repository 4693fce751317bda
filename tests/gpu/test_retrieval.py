"""Dense retrieval on a GPU finds what it finds on the CPU, to the bit of the scores."""

from __future__ import annotations

import pytest
import torch

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
