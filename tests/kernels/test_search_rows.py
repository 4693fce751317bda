"""What the search on a GPU keeps of its rows, which torch makes: nothing here wants a GPU, or the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
_topk_cuda = importlib.import_module("searchr1_kernels._topk_cuda")
digit_base = importlib.import_module("searchr1_kernels._topk_bounds_triton").digit_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", ["normal", "copies", "large component", "tiny"])
def test_prepared_rows_are_the_rows_up_to_what_is_said(monkeypatch, kind, dtype):
    """center + scale * codes and what they lack: norms from fp64, no less than the truth and little more."""
    monkeypatch.setattr(_topk_cuda, "_ROWS_AT_ONCE", 200)
    generator, scales = torch.Generator().manual_seed(0), None
    corpus = torch.randn(500, 50, generator=generator)
    if kind == "copies":
        corpus[:] = corpus[:1]
    corpus[:, 0] *= 1000 if kind == "large component" else 1
    corpus *= 1e-37 if kind == "tiny" else 1
    if dtype == torch.int8:
        corpus, scales = corpus / corpus.abs().amax() * 127, 2 * torch.randn(500, generator=generator)
    corpus = corpus.to(dtype)
    norms, center, codes, row_scales, residuals, magnitudes = _topk_cuda.prepare(corpus, scales, "int8")
    rows = corpus.double() * (1.0 if scales is None else scales.double()[:, None])
    coded = row_scales.double()[:, None] * codes.double()
    lacking = (rows - center.double() - coded).norm(dim=1)
    of_blocks = [torch.stack([part.amax() for part in x.norm(dim=1).split(128)]) for x in (rows, coded)]
    for said, true in ((norms, of_blocks[0]), (residuals, lacking), (magnitudes, of_blocks[1])):
        assert (true <= said.double()).all() and (said.double() <= true * (1 + 3e-6) + 1.1e-33).all()
    assert codes.abs().max() <= 127
    assert (lacking <= 0.5001 * 50**0.5 * row_scales.double().abs() + 1e-43).all()
    (alone,) = _topk_cuda.prepare(corpus, scales, "float")
    assert torch.equal(alone, norms)


def test_rows_that_begin_anywhere_are_copied_if_that_helps():
    memory = torch.randn(9 * 32 + 1)
    anywhere, there = memory[1:].view(9, 32), memory[:-1].view(9, 32)
    copy = _topk_cuda.aligned(anywhere)
    assert copy.data_ptr() % 16 == 0 and torch.equal(copy, anywhere)
    odd = memory[1:].view(12, 24)  # no row but the first is at whole 16 numbers, wherever that is
    assert _topk_cuda.aligned(there) is there and _topk_cuda.aligned(odd) is odd


def test_numbers_that_are_not_finite_are_named():
    for corpus, scales in (
        (torch.full((3, 2), torch.nan), None),
        (torch.ones(3, 2, dtype=torch.int8), torch.tensor([1.0, torch.inf, 1.0])),
    ):
        with pytest.raises(ValueError, match="corpus: expected finite numbers"):
            _topk_cuda.prepare(corpus, scales, "float")


def test_sums_of_two_digits_fit():
    for size in (1, 70, 768, 1024, 1036, 1037, 4096, 100_000):
        base = digit_base(size)
        assert base >= 2 or size > 60_000
        assert size * 127 * (127 * base + base // 2) < 1 << 31
    assert (digit_base(768), digit_base(1024), digit_base(2048)) == (128, 128, 64)
