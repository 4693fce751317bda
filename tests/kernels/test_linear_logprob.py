"""linear_logprob against its fp64 oracle: values, gradients, extremes, and what must not depend on the chunking."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _installed, _linear_chunks, _linear_sums, linear_logprob, reference


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make the head use several chunks at test sizes, some kept for the backward pass and some recomputed."""
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 7)
    monkeypatch.setitem(_linear_chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(_linear_chunks._KEEP_BYTES, "cpu", 3000)


def problem(rows, size, vocabulary, seed=0, dtype=torch.float64, scale=1.0):
    """-> hidden [N,D], weight [V,D], targets [N]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def run(function, hidden, weight, targets, coefficients, **options):
    """-> logprob, entropy, d hidden, d weight; the gradients are those of a fixed combination of both outputs."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = function(hidden, weight, targets, return_entropy=True, **options)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(logprob.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    (coefficients[0] * (a * logprob).sum() + coefficients[1] * (b * entropy).sum()).backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def assert_close(ours, oracle, tolerance):
    for name, have, want in zip(("logprob", "entropy", "d hidden", "d weight"), ours, oracle, strict=True):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((have.double() - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"


def assert_as_near_as_plain_torch(ours, plain, oracle):
    """Norms of errors: at most 3 times plain torch's for scores and twice for gradients, plus rounding of a sum."""
    for place, (have, other, want) in enumerate(zip(ours, plain, oracle, strict=True)):
        off, allowed = (float((tensor.double() - want).norm() / want.norm()) for tensor in (have, other))
        assert off <= (3 if place < 2 else 2) * allowed + 1e-7


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    size=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    temperature=st.sampled_from([0.6, 1.0, 1.5]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    coefficients=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle_in_fp64(rows, size, vocabulary, temperature, softcap, coefficients, masked, seed):
    hidden, weight, targets = problem(rows, size, vocabulary, seed)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    options = {"temperature": temperature, "softcap": softcap, "mask": mask}
    ours = run(linear_logprob, hidden, weight, targets, coefficients, **options)
    assert_close(ours, run(reference.linear_logprob, hidden, weight, targets, coefficients, **options), 1e-11)
    if masked:
        assert all((tensor[~mask] == 0).all() for tensor in ours[:3])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    hidden, weight, targets = problem(9, 3, 5)
    mask = torch.arange(9) % 4 != 1

    def both(hidden, weight):
        return linear_logprob(hidden, weight, targets, temperature=0.7, softcap=softcap, mask=mask, return_entropy=True)

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("scale", [0.1, 1.0])  # flat and peaky heads
def test_fp32_is_near_fp64(scale):
    hidden, weight, targets = problem(50, 64, 1003, dtype=torch.float32, scale=scale)
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]  # sampled tokens are likely ones
    ours = run(linear_logprob, hidden, weight, targets, (1.0, 0.5))
    oracle = run(reference.linear_logprob, hidden.double(), weight.double(), targets, (1.0, 0.5))
    assert ours[0].dtype == torch.float32
    assert float((ours[0].double() - oracle[0]).abs().max()) <= 2e-5
    assert float((ours[1].double() - oracle[1]).abs().max()) <= 2e-5
    assert_close(ours, oracle, 1e-5)
    assert_as_near_as_plain_torch(ours, run(reference.linear_logprob, hidden, weight, targets, (1.0, 0.5)), oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_fp32_logprobs(dtype):
    hidden, weight, targets = problem(30, 32, 301, dtype=dtype)
    ours = run(linear_logprob, hidden, weight, targets, (1.0, 0.5))
    oracle = run(reference.linear_logprob, hidden.double(), weight.double(), targets, (1.0, 0.5))
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == ours[3].dtype == dtype
    for have, want in zip(ours[:2], oracle[:2], strict=True):
        assert float((have.double() - want).abs().max()) <= 2e-5  # the inputs are rounded, the arithmetic is not
    assert_close(ours, oracle, 2 * torch.finfo(dtype).eps)
    assert_as_near_as_plain_torch(ours, run(reference.linear_logprob, hidden, weight, targets, (1.0, 0.5)), oracle)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits(magnitude):
    """One logit far above or below the others, as the target and not; and all of them equally far."""
    weight = torch.tensor([[magnitude], [0.0], [1.0]])
    hidden, targets = torch.ones(3, 1), torch.tensor([0, 1, 2])
    ours = run(linear_logprob, hidden, weight, targets, (1.0, 1.0))
    oracle = run(reference.linear_logprob, hidden.double(), weight.double(), targets, (1.0, 1.0))
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_close(ours, oracle, 1e-6)
    flat = run(linear_logprob, hidden, torch.full((5, 1), magnitude), targets, (1.0, 1.0))
    torch.testing.assert_close(flat[0], torch.full((3,), 0.2).log())
    torch.testing.assert_close(flat[1], torch.full((3,), 5.0).log())


def test_no_rows_still_connects_to_the_graph():
    hidden, weight, targets = problem(0, 4, 6, dtype=torch.float32)
    for mask, hidden_rows in ((None, hidden), (torch.zeros(3, dtype=torch.bool), torch.randn(3, 4))):
        rows, head = hidden_rows.clone().requires_grad_(), weight.clone().requires_grad_()
        ids = targets if mask is None else torch.full((3,), -100)
        logprob = linear_logprob(rows, head, ids, mask=mask)
        logprob.sum().backward()
        assert (logprob == 0).all()
        assert (rows.grad == 0).all()
        assert (head.grad == 0).all()
        assert head.grad.shape == head.shape


def test_what_masked_rows_hold_does_not_matter():
    hidden, weight, targets = problem(20, 5, 11)
    mask = torch.arange(20) % 3 != 0
    clean = run(linear_logprob, hidden, weight, targets, (1.0, 1.0), mask=mask)
    hidden[~mask], targets[~mask] = float("nan"), -100
    dirty = run(linear_logprob, hidden, weight, targets, (1.0, 1.0), mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def heights_agree(hidden, weight):
    """Whether this library gives rows the same bits in products of 16 and of more rows, which the promise relies on."""
    hidden, weight = (tensor.to(_linear_sums.compute_dtype(tensor)) for tensor in (hidden, weight))
    together = hidden @ weight.T
    return all(torch.equal(hidden[i : i + 16] @ weight.T, together[i : i + 16]) for i in range(0, len(hidden), 16))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.float32, None), (torch.float32, 9.0), (torch.bfloat16, None), (torch.float16, None), (torch.float64, None)],
)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(monkeypatch, threads, dtype, softcap):
    """In a batch of any size, over several chunks or one, with or without a gradient to come."""
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 20)
    torch.set_num_threads(threads)
    hidden, weight, targets = problem(48, 100, 33_000, dtype=dtype)
    if not heights_agree(hidden, weight):
        pytest.skip("products of this library depend on the number of rows, also where that is a multiple of 16")
    together = torch.stack(linear_logprob(hidden, weight, targets, softcap=softcap, return_entropy=True))
    for begin, end in ((0, 1), (47, 48), (5, 8), (3, 33)):
        for tracked in (False, True):
            rows = hidden[begin:end].clone().requires_grad_(tracked)
            some = linear_logprob(rows, weight, targets[begin:end], softcap=softcap, return_entropy=True)
            assert torch.equal(torch.stack(some), together[:, begin:end])


def test_a_nan_stays_in_its_row():
    hidden, weight, targets = problem(20, 8, 13, dtype=torch.float32)
    clean = torch.stack(linear_logprob(hidden, weight, targets, return_entropy=True))
    hidden[5, 3] = float("nan")
    dirty = torch.stack(linear_logprob(hidden, weight, targets, return_entropy=True))
    others = torch.arange(20) != 5
    assert dirty[:, 5].isnan().all()
    assert torch.equal(dirty[:, others], clean[:, others])


def test_a_vocabulary_of_one_token():
    hidden, weight, targets = problem(20, 3, 1, dtype=torch.float32)
    assert all((tensor == 0).all() for tensor in run(linear_logprob, hidden, weight, targets, (1.0, 1.0)))


def test_a_token_of_probability_zero():
    """A logit of minus infinity gives that log-probability, and the other tokens have theirs as without it."""
    hidden, weight, targets = problem(6, 1, 5, dtype=torch.float32)
    hidden, targets = hidden.abs() + 0.5, targets.clamp(max=3)
    weight[4] = -float("inf")
    rows = hidden.clone().requires_grad_()
    logprob = linear_logprob(rows, weight, targets)
    torch.testing.assert_close(logprob, linear_logprob(hidden, weight[:4], targets))
    assert linear_logprob(hidden, weight, torch.full((6,), 4)).eq(-float("inf")).all()


def test_repeats_bit_for_bit():
    hidden, weight, targets = problem(50, 16, 99, dtype=torch.float32)
    runs = [run(linear_logprob, hidden, weight, targets, (1.0, 0.3)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (1.0, 0.4)])
@pytest.mark.parametrize("keep_bytes", [0, 3000, 1 << 20])
def test_kept_and_recomputed_chunks_agree(monkeypatch, keep_bytes, coefficients):
    monkeypatch.setitem(_linear_chunks._KEEP_BYTES, "cpu", keep_bytes)
    hidden, weight, targets = problem(50, 8, 30)
    ours = run(linear_logprob, hidden, weight, targets, coefficients)
    assert_close(ours, run(reference.linear_logprob, hidden, weight, targets, coefficients), 1e-11)


def test_rows_without_gradient_are_skipped_exactly():
    hidden, weight, targets = problem(40, 6, 13)
    for share in (0.2, 0.9):
        coefficient = (torch.arange(40) < 40 * share).double()
        gradients = []
        for function in (linear_logprob, reference.linear_logprob):
            rows, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            (function(rows, head, targets) * coefficient).sum().backward()
            gradients.append((rows.grad, head.grad))
        for have, want in zip(*gradients, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-12)


def test_a_second_backward_pass_gives_the_same_gradient():
    hidden, weight, targets = problem(30, 6, 13)
    weight.requires_grad_()
    loss = linear_logprob(hidden, weight, targets).sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen):
    hidden, weight, targets = problem(20, 6, 13)
    inputs = {"hidden": hidden, "weight": weight}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    linear_logprob(**inputs, targets=targets).sum().backward()
    moving = "weight" if frozen == "hidden" else "hidden"
    have = inputs[moving].grad.clone()
    inputs[moving].grad = None
    reference.linear_logprob(**inputs, targets=targets).sum().backward()
    torch.testing.assert_close(have, inputs[moving].grad, rtol=0, atol=1e-12)
    assert inputs[frozen].grad is None


def test_a_head_may_be_the_embedding():
    """Tied weights: head and embedding add to one gradient, over two micro-batches."""
    _, weight, targets = problem(20, 5, 13)
    ids = torch.arange(20) % 13
    gradients = []
    for function in (linear_logprob, reference.linear_logprob):
        tied = weight.clone().requires_grad_()
        for part in (slice(0, 8), slice(8, 20)):
            function(tied[ids[part]].tanh(), tied, targets[part]).sum().backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_backward_pass_may_run_in_another_thread():
    hidden, weight, targets = problem(30, 6, 13)
    want = run(linear_logprob, hidden, weight, targets, (1.0, 0.0))[3]
    weight.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    loss = (torch.randn(30, generator=generator, dtype=torch.float64) * linear_logprob(hidden, weight, targets)).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(weight.grad, want, rtol=0, atol=1e-12)


def test_inputs_need_not_be_contiguous():
    hidden, weight, targets = problem(21, 6, 13)
    strided = linear_logprob(hidden.T.contiguous().T, weight.T.contiguous().T, torch.stack([targets, targets], 1)[:, 0])
    torch.testing.assert_close(strided, linear_logprob(hidden, weight, targets), rtol=0, atol=1e-12)
    assert strided.shape == (21,)


def test_logits_of_all_rows_are_never_alive_at_once(monkeypatch, live_bytes):
    """At its peak a call adds the kept chunks, one more chunk, and the gradients."""
    monkeypatch.setitem(_linear_chunks._CHUNK_BYTES, "cpu", 64 << 10)
    monkeypatch.setitem(_linear_chunks._KEEP_BYTES, "cpu", 128 << 10)
    hidden, weight, targets = problem(1000, 4, 512, dtype=torch.float32)
    head = sys.modules["searchr1_kernels.linear_logprob"]
    with live_bytes:
        logprobs, entropy, saved = head._forward(hidden, weight, targets, 1.0, None, False, True)
        head._backward(logprobs, None, hidden, weight, targets, entropy, saved, 1.0, None, True, True)
    gradients, vectors = hidden.nbytes + weight.nbytes, 10 * logprobs.nbytes
    assert 128 << 10 < live_bytes.peak <= (128 << 10) + (64 << 10) + gradients + vectors
    assert live_bytes.peak < 1000 * 512 * 4 / 8


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(_installed.importlib.util, "find_spec", lambda name: None)
    _installed.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed.*pip install triton"):
        assert not _installed.has_triton()
    _installed.has_triton.cache_clear()


@pytest.mark.parametrize(
    ("free", "reserved", "budget"),
    [(80 << 30, 0, 1 << 30), (5 << 30, 0, 1 << 30), (3 << 30, 0, 1 << 29), (1 << 29, 3 << 30, 1 << 29), (0, 0, 0)],
)
def test_a_workspace_takes_a_quarter_of_the_free_memory(monkeypatch, free, reserved, budget):
    """At most, in powers of two; memory that torch has reserved but not allocated counts as free."""
    statistics = {"reserved_bytes.all.current": reserved + 7, "allocated_bytes.all.current": 7}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 << 30))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: statistics)
    gpu = torch.device("cuda", 0)
    assert _linear_chunks.memory_budget(gpu, 1 << 30) == budget
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 256)
    assert _linear_chunks._chunk_rows(gpu, 151_936 * 4) == max(256, budget // (151_936 * 4))


@settings(deadline=None)
@given(total=st.integers(0, 500), most=st.integers(1, 100), kept=st.integers(0, 600))
def test_chunks_cover_everything_once(total, most, kept):
    """What is kept is whole chunks, as many as the byte budget holds; if all are, also the rows that pad a product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_chunks, "_chunk_rows", lambda device, row_bytes: most)
        patch.setitem(_linear_chunks._KEEP_BYTES, "cpu", kept * 8)
        hidden, weight = torch.empty(total, 1), torch.empty(2, 1)
        ranges = _linear_chunks.chunk_ranges(hidden, weight, for_gradient=True)
        saved = _linear_chunks.PlainRows.saved_shape(hidden, weight, None, True)
    assert [row for part in ranges for row in range(total)[part]] == list(range(total))
    assert all(0 < part.stop - part.start <= most for part in ranges)
    most_kept = max([part.stop for part in ranges if part.stop <= kept], default=0)
    assert saved == (-(-total // 16) * 16 if total <= kept else most_kept, 2)


@pytest.mark.parametrize("for_gradient", [False, True])
def test_a_chunk_of_bf16_rows_fits_its_gibibyte(for_gradient):
    """Logits are fp32, as on a GPU, and a gradient adds as many 16-bit numbers; one chunk fewer would not fit."""
    hidden = torch.empty(100_000, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(151_936, 8, dtype=torch.bfloat16, device="meta")
    row_bytes = 151_936 * (6 if for_gradient else 4)
    chunks = _linear_chunks.chunk_ranges(hidden, weight, for_gradient=for_gradient)
    fewer = -(-100_000 // (len(chunks) - 1))
    assert _linear_chunks.longest(chunks) * row_bytes <= 1 << 30 < fewer * row_bytes


def test_a_chunk_on_a_gpu_is_whole_tiles():
    assert [_linear_chunks.whole_tiles(size) for size in (1, 127, 128, 129, 300)] == [128, 128, 128, 256, 384]


def test_a_workspace_takes_no_more_than_a_quarter_of_free_memory(monkeypatch):
    """Memory that torch keeps for later counts as free; its amount is not even read where memory is plentiful."""
    device, looks = torch.device("cuda"), []
    gib = 1 << 30

    def statistics(device):
        looks.append(device)
        return {"reserved_bytes.all.current": 5 * gib, "allocated_bytes.all.current": 3 * gib}

    monkeypatch.setattr(torch.cuda, "memory_stats", statistics)
    for free, most, budget in ((8.0, 1, 1), (100.0, 1, 1), (6.0, 2, 2), (5.9, 2, 1), (5.9, 1, 1), (1.9, 1, 0.5)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free * gib), 100 * gib))
        assert _linear_chunks.memory_budget(device, most * gib) == budget * gib, (free, most)
        assert bool(looks) == (free < 8 * most)
        looks.clear()
    assert _linear_chunks.memory_budget(torch.device("cpu"), 77) == 77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, "hidden: expected shape"),
        ({"weight": torch.zeros(5, 2)}, "weight: expected shape"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, "weight: expected torch.float32"),
        ({"weight": torch.zeros(0, 3)}, "weight: expected at least one vocabulary row, got none"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "hidden: expected a floating-point"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets: expected shape"),
        ({"targets": torch.zeros(4)}, "targets: expected torch.int64"),
        ({"targets": torch.full((4,), 5)}, "targets: expected ids from 0 to 4, got 5"),
        ({"targets": torch.full((4,), -100)}, "targets: expected ids from 0 to 4, got -100"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"softcap": -1.0}, "softcap: expected a finite number above 0"),
        ({"mask": torch.ones(4)}, "mask: expected torch.bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask: expected shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))
