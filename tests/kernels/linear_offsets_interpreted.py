"""The head's Triton kernels on memory of more numbers than 32 bits count. Run by `test_triton`, as the others are."""

from __future__ import annotations

import pytest
import torch
from far_memory import far_memory
from linear_interpreted import DEVICE, problem, small_tiles  # noqa: F401  # the fixture is for every test here
from searchr1_kernels import _linear_forward_triton as forward_kernels
from searchr1_kernels import _linear_gradient_triton as gradient_kernels
from searchr1_kernels import _linear_rows_triton as row_kernels


def far_apart(folder, rows, columns):
    """[rows, columns] fp16 whose rows begin 2^30 numbers apart."""
    width = 1 << 30
    return far_memory(folder, (rows - 1) * width + columns, DEVICE).as_strided((rows, columns), (width, 1))


def test_offsets_beyond_32_bits(tmp_path):
    """Rows that begin 2^31 numbers into the logits."""
    columns = 40
    logits = far_apart(tmp_path, 3, columns)
    hidden, weight, targets = problem(3, 8, columns)
    small = (hidden @ weight.T).half()
    logits.copy_(small)
    results = []
    for values in (logits, small):
        outputs = [torch.zeros(*shape, device=DEVICE) for shape in ((3,), (3,), (3, 2))]
        options = row_kernels.launch_options(1.0, None, columns)
        row_kernels.score_rows[(3,)](values, targets, *outputs, columns, values.stride(0), ENTROPY=True, **options)
        row_kernels.differentiate_rows[(3,)](
            values, values, targets, outputs[0], outputs[0], outputs[1], outputs[2], 0, columns, values.stride(0),
            ENTROPY=True, **options,
        )  # fmt: skip
        results.append(outputs)
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)
    assert torch.equal(logits, small)


@pytest.mark.parametrize("side", ["hidden", "weight", "kept"])
def test_offsets_beyond_32_bits_of_operands_and_kept_probabilities(monkeypatch, tmp_path, side):
    monkeypatch.setattr(gradient_kernels, "aligned_rows", lambda buffer, rows, columns: buffer[:rows, :columns])
    monkeypatch.setattr(gradient_kernels, "SCALE_ROWS", False)
    hidden, weight, targets = problem(3, 8, 3, dtype=torch.float16)
    g, (logprob, entropy), results = torch.ones(3, device=DEVICE), torch.empty(2, 3, device=DEVICE), []
    for memory in (far_apart(tmp_path, 3, 8), torch.empty(3, 8, dtype=torch.float16, device=DEVICE)):
        tensors = {"hidden": hidden, "weight": weight, "kept": torch.empty_like(weight)}
        tensors[side] = memory.copy_(tensors[side])
        sides = (tensors["hidden"], tensors["weight"])
        scores = forward_kernels.score_without_logits(*sides, targets, 1.0, None, True)
        passes = gradient_kernels.KeptRows(*sides, 1.0, None, 3, for_gradient=True)
        passes.kept = tensors["kept"]
        passes.scores(sides[0], targets, logprob, entropy)
        results.append((*scores, logprob.clone(), passes.gradient(targets, g, g, entropy)[0].clone()))
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)
