"""The head and the likeliest token in one pass, against fp64."""

from __future__ import annotations

import numba
import pytest
import torch
from searchr1_kernels import _head_numba
from searchr1_kernels._panels_llvm import takes

pytestmark = pytest.mark.skipif(not takes(is_bf16=True), reason="needs AVX-512 and AMX")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=[1, 2])
def num_threads(request):
    before = numba.get_num_threads()
    numba.set_num_threads(min(request.param, numba.config.NUMBA_NUM_THREADS))
    yield request.param
    numba.set_num_threads(before)


def make(num_rows: int, vocab_size: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, size, generator=generator)
    return hidden.to(dtype), torch.randn(vocab_size, size, generator=generator).mul(0.3).to(dtype)


@DTYPES
@pytest.mark.parametrize(("num_rows", "vocab_size", "size"), [(33, 64, 32), (256, 1056, 64), (41, 512, 160)])
def test_equals_fp64(num_rows, vocab_size, size, dtype, num_threads):
    hidden, weight = make(num_rows, vocab_size, size, dtype)
    assert _head_numba.takes(hidden, weight)
    ids, logprobs = _head_numba.likeliest(hidden, weight)
    want = (hidden.double() @ weight.double().T).log_softmax(-1)
    first, second = want.topk(2).values.T
    clear = first - second > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(ids[clear], want.argmax(-1)[clear])
    torch.testing.assert_close(logprobs.double(), want.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-5)


@DTYPES
def test_a_row_has_the_same_bits_in_any_place(dtype):
    hidden, weight = make(70, 256, 64, dtype)
    ids, logprobs = _head_numba.likeliest(hidden, weight)
    for rows in (torch.arange(16), torch.arange(70).flip(0), torch.full((17,), 3)):
        again = _head_numba.likeliest(hidden[rows], weight)
        assert torch.equal(again[0], ids[rows]) and torch.equal(again[1], logprobs[rows])


@DTYPES
def test_of_equals_the_first(dtype):
    hidden, weight = make(20, 128, 32, dtype)
    weight[70:] = weight[:58]
    ids, _ = _head_numba.likeliest(hidden, weight)
    assert (ids < 70).all()
    ids, logprobs = _head_numba.likeliest(torch.zeros_like(hidden), weight)
    assert (ids == 0).all()
    torch.testing.assert_close(logprobs, torch.full((20,), -(torch.tensor(128.0).log().item())))


@DTYPES
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_seen(dtype, broken):
    hidden, weight = make(20, 128, 32, dtype)
    hidden[3, 5] = broken
    ids, logprobs = _head_numba.likeliest(hidden, weight)
    assert not logprobs[3].isfinite()
    assert logprobs[[*range(3), *range(4, 20)]].isfinite().all()
    assert ((ids >= 0) & (ids < 128)).all()


def test_what_it_does_not_take():
    hidden, weight = make(40, 128, 32, torch.float32)
    assert not _head_numba.takes(hidden[:8], weight)  # too few
    assert not _head_numba.takes(hidden, weight[:100])  # not whole tiles
    assert not _head_numba.takes(hidden[:, :24], weight[:, :24].contiguous())
    assert not _head_numba.takes(hidden, weight.bfloat16())
    assert not _head_numba.takes(hidden.double(), weight.double())
