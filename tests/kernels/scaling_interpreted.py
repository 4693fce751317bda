"""The Triton kernels of `_scaling`. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU (`pytest tests/kernels/scaling_interpreted.py`) they are compiled.
"""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import _scaling, _scaling_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates fp32 to bf16 instead of rounding.
DTYPES = [torch.float32, torch.float64, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def numbers(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use several blocks, and programs that take more than one."""
    monkeypatch.setattr(_scaling_triton, "_BLOCK", 16)
    if DEVICE == "cpu":
        monkeypatch.setattr(_scaling_triton, "_PROGRAMS", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (16,), (7, 23), (3, 5, 64)])
def test_scale_is_its_plain_twin_to_the_bit(shape, dtype):
    for number in (1.0, 1.003, 0.0, float("nan")):
        factor = torch.tensor(number, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        have, want = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype)
        _scaling_triton.scale(have, factor)
        torch.mul(want, factor.reshape(1), out=want)
        assert torch.equal(have.nan_to_num(7.0), want.nan_to_num(7.0))


def test_a_factor_of_one_touches_nothing():
    """Not even a NaN, whose quiet bit a product would set."""
    bits = torch.tensor([0x7F800001, 0x3F800000] * 20, dtype=torch.int32, device=DEVICE)
    tensor = bits.clone().view(torch.float32)
    _scaling_triton.scale(tensor, torch.ones((), device=DEVICE))
    assert torch.equal(tensor.view(torch.int32), bits)


def test_a_view_is_scaled_and_nothing_beside_it(monkeypatch):
    monkeypatch.setattr(_scaling, "_fused", lambda tensor: True)
    for take in (lambda tensor: tensor, lambda tensor: tensor.T, lambda tensor: tensor[:, 1:4]):
        have, want = numbers(5, 7), numbers(5, 7)
        _scaling.scale(take(have), torch.tensor(3.0, device=DEVICE))
        take(want).mul_(3.0)
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (5, 1), (4, 37), (2, 1030)])
def test_scaled_rows_are_their_plain_twin_to_the_bit(shape, dtype, out_dtype):
    rows = numbers(*shape, dtype=dtype)
    scales = numbers(shape[0], dtype=torch.promote_types(dtype, torch.float32))
    have, want = rows.new_empty(2, *shape, dtype=out_dtype)
    wide = torch.cat([rows, rows], dim=1)[:, : shape[1]]  # the row stride exceeds the row length
    _scaling_triton.scale_rows(wide, scales, have)
    torch.mul(rows, scales[:, None], out=want)
    assert torch.equal(have, want)


def test_what_runs_without_triton():
    rows, scales, out = numbers(3, 5), numbers(3), numbers(3, 5)
    _scaling.scale_rows(rows, scales, out)
    assert torch.equal(out, rows * scales[:, None])
    _scaling.scale(out, torch.tensor(2.0, device=DEVICE))
    assert torch.equal(out, 2.0 * rows * scales[:, None])
