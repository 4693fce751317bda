"""What two ranks (gloo, FSDP2 on the CPU) send in an update: as often as `reshard_after` and `reduce_after` ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

NUM_BATCHES = 3
BLOCKS = ("decoder.model.layers.0", "decoder.model.layers.1")


@pytest.fixture(scope="module")
def reports(tmp_path_factory, on_two_ranks) -> list[dict]:
    """Reports of both ranks, by settings; a single launch, as starting processes takes most of the time."""
    output = tmp_path_factory.mktemp("collectives")
    on_two_ranks(Path(__file__).parent / "two_ranks_collectives.py", output)
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce_after", ["microbatch", "update"])
@pytest.mark.parametrize("reshard_after", ["forward", "backward", "update"])
def test_what_is_sent(reports, dtype, reshard_after, reduce_after):
    """Embedding and head, in the root "", are needed at both ends of a pass and stay in between."""
    of_block = {"forward": 2 * NUM_BATCHES, "backward": NUM_BATCHES, "update": 1}[reshard_after]
    of_root = 1 if reshard_after == "update" else NUM_BATCHES
    gathers = dict.fromkeys(BLOCKS, of_block) | {"": of_root}
    without_gradients = dict.fromkeys(BLOCKS, NUM_BATCHES if reshard_after == "forward" else 1) | {"": 1}
    reduces = dict.fromkeys((*BLOCKS, ""), 1 if reduce_after == "update" else NUM_BATCHES)
    for report in reports:
        counted = report[f"{dtype} {reshard_after} {reduce_after}"]
        assert counted["gathers"] == {"reference": without_gradients, "policy": gathers, "critic": gathers}
        assert counted["reduces"] == {"policy": reduces, "critic": reduces}


def test_computing_a_block_again_gathers_it_no_third_time(reports):
    for report in reports:
        assert report["checkpointing"]["gathers"]["policy"] == dict.fromkeys(BLOCKS, 2 * NUM_BATCHES) | {
            "": NUM_BATCHES
        }
        assert set(report["checkpointing"]["reduces"]["policy"].values()) == {1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_learned_is_the_same(reports, dtype):
    """The time when weights are freed changes no bit. Gradients added in another order round differently."""
    for report in reports:
        for reduce_after in ("microbatch", "update"):
            first, *others = (
                report[f"{dtype} {reshard} {reduce_after}"] for reshard in ("forward", "backward", "update")
            )
            for other in others:
                assert [other[key] for key in ("norms", "weights", "logprobs")] == [
                    first[key] for key in ("norms", "weights", "logprobs")
                ]
        often, once = (report[f"{dtype} forward {reduce_after}"] for reduce_after in ("microbatch", "update"))
        assert once["norms"] == pytest.approx(often["norms"], rel=1e-5 if dtype == "float32" else 1e-3)
        # Two AdamW steps of 1e-2: a parameter whose gradient is rounding noise may go either way, the others may not.
        differences = np.abs(np.array(once["weights"]) - np.array(often["weights"]))
        assert (differences < 1e-5).mean() > 0.99 and differences.max() <= 0.04
    assert reports[0][f"{dtype} forward update"]["weights"] == reports[1][f"{dtype} forward update"]["weights"]
