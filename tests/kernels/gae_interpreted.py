"""The Triton scan of `gae`. Run by `test_triton`, not collected by itself.

Without a GPU it runs in Triton's interpreter, in a process of its own because importing Triton fixes that choice. On a
GPU (`pytest tests/kernels/gae_interpreted.py`) it is compiled.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _gae_triton, reference
from searchr1_kernels.gae import _scan_triton
from triton import knobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Use several tiles per sequence; sequences are long above 40 tokens on average."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gae_triton, "TILE", 16)
        patch.setattr(_gae_triton, "NUM_WARPS", 1)
        patch.setattr(_gae_triton, "_LONG", 40)
        yield


def problem(lengths, policy_share, dtype=torch.float64, seed=0):
    """-> rewards [N], values [N], cu_seqlens [S+1], mask [N] or None."""
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    rewards, values = (torch.randn(total, generator=generator).to(DEVICE, dtype) for _ in range(2))
    mask = None if policy_share is None else (torch.rand(total, generator=generator) < policy_share).to(DEVICE)
    return rewards, values, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(DEVICE), mask


def scan(rewards, values, cu_seqlens, mask, gamma=0.97, lam=0.9):
    dtype = torch.promote_types(values.dtype, torch.float32)
    return _scan_triton(rewards, values, cu_seqlens, gamma, lam, mask, dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40, 150, 300]), max_size=6),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    policy_share=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(lengths, gamma, lam, policy_share, seed):
    rewards, values, cu_seqlens, mask = problem(lengths, policy_share, seed=seed)
    wanted = reference.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, mask=mask)
    for have, want in zip(scan(rewards, values, cu_seqlens, mask, gamma, lam), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)
        assert mask is None or (have[~mask] == 0).all()


def test_a_sequence_alone_equals_the_sequence_in_a_batch():
    lengths = [100, 7, 33, 16]
    rewards, values, cu_seqlens, mask = problem(lengths, 0.7, torch.float32)
    together = scan(rewards, values, cu_seqlens, mask)
    pieces = (tensor.split(lengths) for tensor in (rewards, values, mask))
    alone = [
        scan(r, v, torch.tensor([0, len(r)], device=DEVICE), m) for r, v, m in zip(*pieces, strict=True)
    ]  # 64-bit offsets
    for output in range(2):
        assert torch.equal(together[output], torch.cat([pair[output] for pair in alone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy_share", [None, 0.7])
@pytest.mark.parametrize(("tile", "warps"), [(16, 1), (64, 2)])
def test_programs_per_sequence_and_per_tile_agree_to_the_bit(monkeypatch, tile, warps, policy_share, dtype):
    """For any tile, and whenever the second launch begins (on a GPU from sm_90 on)."""
    given = problem([150, 0, 16, 1, 17, 99], policy_share, dtype)
    monkeypatch.setattr(_gae_triton, "TILE", tile)
    monkeypatch.setattr(_gae_triton, "NUM_WARPS", warps)
    want = reference.gae(*(tensor.double() for tensor in given[:2]), given[2], gamma=0.97, lam=0.9, mask=given[3])
    outputs = []
    for long, overlap in ((1000, False), (0, False), (0, True)):
        monkeypatch.setattr(_gae_triton, "_LONG", long)
        monkeypatch.setattr(_gae_triton, "OVERLAP", overlap)
        outputs.append(scan(*given))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], torch.stack(want).to(dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_sequences", [15, 16, 17, 255, 256, 257])
def test_a_tile_finds_its_sequence_among_many(monkeypatch, num_sequences):
    """The search takes as many steps as the number of sequences has digits to the base of the tile's length."""
    monkeypatch.setattr(_gae_triton, "_LONG", 0)
    lengths = [
        (0, 3, 1, 40, 0, 17, 16)[i % 7] if i % 5 == 0 or num_sequences < 20 else i % 2 for i in range(num_sequences)
    ]
    rewards, values, cu_seqlens, mask = problem(lengths, 0.7)
    wanted = reference.gae(rewards, values, cu_seqlens, gamma=0.97, lam=0.9, mask=mask)
    for have, want in zip(scan(rewards, values, cu_seqlens, mask), wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)


class Compiled:
    """Stands in for a compiled kernel: runs the interpreter on the memory that the pointers address."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel, tensors, options):
        self.kernel, self.options, self.num_launches = kernel, options, 0
        self.types = [(tensor.dtype, tensor.dim()) for tensor in tensors]

    def run(self, programs, one, two, stream, function, metadata, description, enter, leave, *arguments):
        assert (one, two, stream) == (1, 1, "stream") and (function, metadata) == (self.function, self.packed_metadata)
        assert description is enter is leave is None
        assert len(arguments) == len(self.kernel.arg_names)
        pointers, numbers = arguments[: len(self.types)], arguments[len(self.types) :]
        # The constants are the last two or three.
        num_tokens, num_sequences = numbers[0], programs if len(numbers) == 7 else numbers[5]
        room = 2 * programs + _gae_triton._AHEAD.value
        lengths = [num_tokens, num_tokens, num_tokens, num_sequences + 1, num_tokens, room]
        tensors = []
        for pointer, (dtype, dimensions), length in zip(pointers, self.types, lengths, strict=False):
            size = dimensions * length  # [2, N] of two dimensions
            memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(pointer)
            tensors.append(torch.frombuffer(memory, dtype=dtype).view(dimensions, length).squeeze(0))
        self.num_launches += 1
        self.kernel[(programs,)](*tensors, *numbers, **self.options)


class Remembered:
    """Stands in for a kernel: returns the compiled kernel of a launch; a GPU has one per set of types."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.kernel[grid](*arguments, **options)
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            self.compiled.append(Compiled(self.kernel, tensors, options))
            return self.compiled[-1]

        return launch


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are remembered there in any case")
@pytest.mark.parametrize("long", [False, True])
def test_a_remembered_kernel_is_one_for_these_types(monkeypatch, long):
    compiled, remembered = [], {}
    for name in ("scan_sequences", "scan_tiles", "apply_carries"):
        monkeypatch.setattr(_gae_triton, name, Remembered(getattr(_gae_triton, name), compiled))
    monkeypatch.setattr(_gae_triton, "_kernels", remembered)
    monkeypatch.setattr(_gae_triton, "driver", SimpleNamespace(active=SimpleNamespace(
        get_current_stream=lambda device: "stream")))  # fmt: skip
    monkeypatch.setattr(_gae_triton, "_LONG", 0 if long else 40)
    problems = []
    for policy_share in (None, 0.5):
        for dtype in (torch.float32, torch.float64, torch.float16):
            rewards, values, cu_seqlens, mask = problem([17, 3, 40], policy_share, dtype)
            problems += [(rewards, values, cu_seqlens, mask), (rewards, values, cu_seqlens.int(), mask)]
            problems.append((rewards.float(), values, cu_seqlens, mask))
    first = [scan(*arguments) for arguments in problems]
    count = len(compiled)
    assert count == len(remembered) == 16 * (1 + long)  # of 18, two have the types of others
    for arguments, want in zip(problems, first, strict=True):
        assert torch.equal(scan(*arguments), want)
    assert len(compiled) == count
    assert sum(kernel.num_launches for kernel in compiled) == (18 + 2) * (1 + long)
    monkeypatch.setattr(_gae_triton, "_has_hooks", lambda: True)  # a profiler, which sees Triton's own launches
    scan(*problems[0])
    assert len(compiled) == count + 1 + long


def test_a_profiler_is_noticed():
    hook = lambda *_: None  # noqa: E731
    assert not _gae_triton._has_hooks()
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hooks.add(hook)
        assert _gae_triton._has_hooks()
        hooks.remove(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", None)
        assert not _gae_triton._has_hooks()
        patch.setattr(knobs.runtime, "launch_enter_hook", hook)
        assert _gae_triton._has_hooks()


def test_what_stands_at_masked_tokens_does_not_matter():
    rewards, values, cu_seqlens, mask = problem([60, 40], 0.5)
    want = scan(rewards, values, cu_seqlens, mask)
    values[~mask] = torch.nan
    for left, right in zip(scan(rewards, values, cu_seqlens, mask), want, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_type_and_any_view(dtype):
    rewards, values, cu_seqlens, mask = problem([50, 30], 0.5, dtype)
    want = scan(rewards.double(), values.double(), cu_seqlens, mask)
    views = (torch.stack([tensor, tensor], dim=1)[:, 0] for tensor in (rewards, values))
    for have, exact in zip(scan(*views, cu_seqlens, mask), want, strict=True):
        assert have.dtype == torch.float32
        assert torch.equal(have, exact.float())


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths):
    for output in scan(*problem(lengths, None)):
        assert output.shape == (0,)
