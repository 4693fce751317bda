"""The head's Triton kernels against fp64. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU (`pytest tests/kernels/linear_interpreted.py`) they are compiled. bf16 products are left to a GPU: the interpreter
multiplies bf16 bit patterns as integers and silently returns nonsense.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from searchr1_kernels import PolicyLoss, _linear_chunks, _linear_slabs, linear_logprob, linear_policy_loss, reference
from searchr1_kernels import _linear_forward_triton as forward_kernels
from searchr1_kernels import _linear_gradient_triton as gradient_kernels
from searchr1_kernels import _linear_rows_triton as row_kernels
from searchr1_kernels._objective_operator import arguments
from searchr1_kernels.policy_objective import PolicyRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# No shrinking: an example takes the interpreter up to a second.
LIMITED = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Use several blocks, chunks, spans, groups and launches at test sizes, and the fused passes on any device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_chunks, "runs_fused", lambda hidden: True)
        patch.setattr(sys.modules["searchr1_kernels.linear_policy_loss"], "live_rows", lambda *_: None)  # as on CUDA
        for name, value in (("_SLAB_BYTES", 20 * 7 * 4), ("_MAX_ROWS", 7), ("_MIN_COLUMNS", 8)):
            patch.setattr(_linear_slabs, name, value)
        patch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 7)
        patch.setitem(_linear_chunks._CHUNK_BYTES, DEVICE, 1)
        patch.setattr(_linear_chunks, "_KEPT_BYTES", 1)
        patch.setattr(_linear_chunks, "_TILE_ROWS", 1)
        patch.setattr(gradient_kernels, "_TILES_AT_ONCE", 2)
        patch.setattr(gradient_kernels, "_HEADROOM", 3.0)  # for fp16, and rows on both sides of it
        patch.setattr(row_kernels, "_BLOCK", 16)
        for name, value in (("_TILE", (16, 16, 16, 4, 2)), ("_SPAN", 32), ("_GROUP", 2), ("_MAX_ROWS", 48)):
            patch.setattr(forward_kernels, name, value)
        for name, value in (("_OWN", (16, 16, 4, 2)), ("_MERGE_ROWS", 8)):
            patch.setattr(forward_kernels, name, value)
        yield


@pytest.fixture(params=[False, True], ids=["library's products", "own products"])
def products(request):
    """Whether the logits' products are those of `_linear_gradient_triton`, here for any type."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("linear_logprob", "linear_policy_loss", "_linear_slabs"):
            patch.setattr(
                sys.modules[f"searchr1_kernels.{name}"],
                "runs_products",
                lambda _, __, softcap: request.param and softcap is None,
            )
        yield request.param


def problem(rows, size, vocabulary, seed=0, dtype=torch.float32, scale=1.0):
    """-> hidden [N,D], weight [V,D], targets [N]; the last target is the last token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * scale).to(DEVICE, dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[-1:] = vocabulary - 1
    return hidden, weight, targets.to(DEVICE)


def gradients(function, hidden, weight, targets, entropy_share, **options):
    """-> logprob, entropy, d hidden, d weight."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logprob, entropy = function(hidden, weight, targets, return_entropy=True, **options)
    a, b = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    a[::3], b[::3] = 0.0, 0.0  # rows that are not read
    loss = (a * logprob).sum()
    if entropy_share:
        loss = loss + entropy_share * (b * entropy).sum()
    loss.backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def assert_close(ours, oracle, tolerance):
    for name, have, want in zip(("logprob", "entropy", "d hidden", "d weight"), ours, oracle, strict=False):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((have.double() - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"


shapes = given(
    rows=st.integers(0, 20),
    size=st.integers(1, 6).map(lambda n: 4 * n),
    vocabulary=st.sampled_from([1, 15, 16, 17, 32, 33, 70]),
    scale=st.sampled_from([0.2, 3.0]),  # a flat head and a peaky one
    head=st.sampled_from([(1.0, None), (0.6, None), (1.5, 5.0)]),
    seed=st.integers(0, 100),
)


@LIMITED
@shapes
def test_row_kernels_match_the_oracle(products, rows, size, vocabulary, scale, head, seed):
    hidden, weight, targets = problem(rows, size, vocabulary, seed, scale=scale)
    options = {"temperature": head[0], "softcap": head[1]}
    for entropy_share in (0.0, 0.5):
        ours = gradients(linear_logprob, hidden, weight, targets, entropy_share, **options)
        exact = (hidden.double(), weight.double(), targets, entropy_share)
        assert_close(ours, gradients(reference.linear_logprob, *exact, **options), 2e-5)


@LIMITED
@shapes
def test_forward_without_logits_matches_the_oracle(rows, size, vocabulary, scale, head, seed):
    for dtype in (torch.float32, torch.float16):
        hidden, weight, targets = problem(rows, 2 * size, vocabulary, seed, dtype, scale)
        ours = forward_kernels.score_without_logits(hidden, weight, targets, *head, True)
        options = {"temperature": head[0], "softcap": head[1], "return_entropy": True}
        assert_close(ours, reference.linear_logprob(hidden.double(), weight.double(), targets, **options), 2e-5)
        assert (ours[0] <= 0).all()
        (alone,) = {forward_kernels.score_without_logits(hidden, weight, targets, *head, False)[1]}
        assert alone is None


def test_forward_over_several_launches_and_groups():
    hidden, weight, targets = problem(100, 16, 70)
    normalizers = hidden.new_empty(100, 2)
    ours = forward_kernels.score_without_logits(hidden, weight, targets, 0.8, None, True, normalizers)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets, temperature=0.8, return_entropy=True)
    assert_close(ours, exact, 2e-5)
    logits = hidden.double() @ weight.double().T
    torch.testing.assert_close(normalizers[:, 0].double(), logits.amax(1), rtol=1e-6, atol=1e-5)
    whole = normalizers[:, 0].double() / 0.8 + normalizers[:, 1].double() * math.log(2)
    torch.testing.assert_close(whole, (logits / 0.8).logsumexp(1), rtol=1e-6, atol=1e-5)


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch():
    hidden, weight, targets = problem(60, 16, 70)
    together = torch.stack(forward_kernels.score_without_logits(hidden, weight, targets, 1.0, None, True))
    for rows in (slice(0, 1), slice(17, 18), slice(59, 60), slice(5, 41)):
        some = forward_kernels.score_without_logits(hidden[rows], weight, targets[rows], 1.0, None, True)
        assert torch.equal(torch.stack(some), together[:, rows])


def test_no_probability_exceeds_one():
    """The logit of a certain target is the largest of all. The two are computed apart and may differ by rounding."""
    partial, logit = torch.tensor([5.0, 1.0, 0.0], device=DEVICE), torch.tensor([5.00001], device=DEVICE)
    logprob, target = torch.empty(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    forward_kernels.merge(partial, logit, target, 3, 1.0, logprob, None, None)
    assert logprob == 0


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits(products, magnitude):
    """One logit far from the others, as the target and not; and all of them equally far."""
    weight = torch.zeros(19, 8, device=DEVICE)
    weight[:3, 0] = torch.tensor([magnitude, 0.0, 1.0])
    hidden, targets = torch.ones(3, 8, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    oracle = gradients(reference.linear_logprob, hidden.double(), weight.double(), targets, 1.0)
    ours = gradients(linear_logprob, hidden, weight, targets, 1.0)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_close(ours, oracle, 1e-6)
    assert_close(forward_kernels.score_without_logits(hidden, weight, targets, 1.0, None, True), oracle, 1e-6)
    flat = torch.full((19, 8), magnitude / 8, device=DEVICE)
    for logprob, entropy in (
        linear_logprob(hidden, flat, targets, return_entropy=True),
        forward_kernels.score_without_logits(hidden, flat, targets, 1.0, None, True),
    ):
        expected = torch.full((3,), 19.0, device=DEVICE).log()
        torch.testing.assert_close(logprob, -expected)
        torch.testing.assert_close(entropy, expected)


def test_inputs_need_not_be_contiguous():
    hidden, weight, targets = problem(6, 8, 37)
    strided = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    want = gradients(linear_logprob, hidden, weight, targets, 0.5)
    have = gradients(linear_logprob, hidden.T.contiguous().T, weight.T.contiguous().T, strided, 0.5)
    assert_close(have, [tensor.double() for tensor in want], 1e-6)
    assert torch.equal(
        forward_kernels.score_without_logits(hidden, weight, strided, 1.0, None, False)[0],
        forward_kernels.score_without_logits(hidden, weight, targets, 1.0, None, False)[0],
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_loud(number):
    """The minimum of NaN and 0 is 0 on a GPU, and in the interpreter since Triton 3.9: a valid log-probability."""
    hidden, weight, targets = problem(4, 8, 37)
    hidden[1, 0] = number
    results = [forward_kernels.score_without_logits(hidden, weight, targets, 1.0, None, True)]
    for passes_type in (row_kernels.FusedRows, gradient_kernels.KeptRows):
        results.append(torch.empty(2, 4, device=DEVICE))
        passes_type(hidden, weight, 1.0, None, 4, for_gradient=True).scores(hidden, targets, *results[-1])
    for logprob, entropy in results:
        assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]


def test_a_target_that_is_no_token_is_loud():
    hidden, weight, targets = problem(4, 8, 19)
    targets[1], targets[2] = -100, 19
    passes = row_kernels.FusedRows(hidden, weight, 1.0, None, 4, for_gradient=False)
    rows = torch.empty(4, device=DEVICE)
    passes.scores(hidden, targets, rows, None)
    for logprob in (rows, forward_kernels.score_without_logits(hidden, weight, targets, 1.0, None, False)[0]):
        assert logprob.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize(("most_rows", "columns"), [(100, 64), (25, 16), (7, 64), (7, 16)])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_slabs_of_any_shape(products, monkeypatch, most_rows, columns, wanted):
    """One chunk of rows or several, columns that do and do not divide V, and any side that wants a gradient."""
    monkeypatch.setattr(_linear_slabs, "_MAX_ROWS", most_rows)
    monkeypatch.setattr(_linear_slabs, "_SLAB_BYTES", columns * 4 * _linear_chunks.chunk_size(25, most_rows))
    hidden, weight, targets = problem(25, 8, 37)
    rows, slab = _linear_slabs.tiles(hidden, weight, products)
    assert slab == min(columns, 37) and rows[0].stop == min(most_rows, 25)
    sides = [tensor.clone().requires_grad_(want) for tensor, want in zip((hidden, weight), wanted, strict=True)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    options = {"temperature": 0.8, "softcap": None if products else 6.0, "return_entropy": True}
    for function, (left, right) in ((linear_logprob, sides), (reference.linear_logprob, exact)):
        logprob, entropy = function(left, right, targets, **options)
        (logprob.sum() + 0.3 * entropy.sum()).backward()
    for have, want, wants in zip(sides, exact, wanted, strict=True):
        assert (have.grad is not None) == wants
        if wants:
            torch.testing.assert_close(have.grad.double(), want.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [14, 40])
def test_memory_of_the_backward_pass(products, monkeypatch, live_bytes, rows):
    """The account of `_linear_slabs`: results, the sum of hidden's gradient, a workspace, and a slab for many rows."""
    monkeypatch.setattr(_linear_slabs, "_MAX_ROWS", 20)
    monkeypatch.setattr(_linear_slabs, "_SLAB_BYTES", 16 * 20 * 4)
    hidden, weight, targets = problem(rows, 64, 100)
    head = sys.modules["searchr1_kernels.linear_logprob"]
    logprobs, entropy, saved = head._forward(hidden, weight, targets, 1.0, None, True, True)
    arguments = (logprobs, logprobs, hidden, weight, targets, entropy, saved, 1.0, None, True, True)
    with live_bytes:
        head._backward(*arguments)
    columns = _linear_slabs.tiles(hidden, weight, products)[1]
    account = weight.nbytes + hidden.nbytes + 4 * min(rows, 20) * columns + (4 * columns * 64 if rows > 20 else 0)
    if products and DEVICE == "cpu":
        account += weight.nbytes + hidden.nbytes  # the interpreter's views of existing memory count as new
    assert account <= live_bytes.peak <= account + 20 * 4 * rows  # and a few numbers per row


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "shared"), [("ppo", False), ("ppo", True), ("cispo", True), ("gspo", False)])
def test_policy_loss_on_the_row_kernels(products, kind, shared, recompute):
    hidden, weight, targets = problem(25, 8, 37)
    token_rows = (torch.arange(40) * 7 % 25 if shared else torch.arange(25)).to(DEVICE)
    rollout = reference.linear_logprob(hidden, weight, targets)[token_rows]
    rollout += 0.3 * torch.randn(len(rollout)).to(DEVICE)
    advantages = torch.randn(len(rollout)).to(DEVICE)
    advantages[::4] = 0.0
    options = {"loss": PolicyLoss(kind=kind, entropy_coefficient=0.1), "denominator": 5.0}
    if not products:
        options["softcap"] = 8.0
    more = {linear_policy_loss: {"recompute": recompute}, reference.linear_policy_loss: {}}
    if shared:
        options["token_rows"] = token_rows
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 9, 25], device=DEVICE)
    results = []
    for function, dtype in ((linear_policy_loss, torch.float32), (reference.linear_policy_loss, torch.float64)):
        sides = [tensor.to(dtype).clone().requires_grad_() for tensor in (hidden, weight)]
        loss, _ = function(*sides, targets, rollout.to(dtype), advantages.to(dtype), **options, **more[function])
        loss.backward()
        results.append((loss.detach(), sides[0].grad, sides[1].grad))
    assert_close(results[0], results[1], 2e-5)


def test_operators_on_these_kernels_pass_torchs_checks(products):
    hidden, weight, targets = problem(5, 8, 19)
    operators, softcap = torch.ops.searchr1_kernels, None if products else 5.0
    sides = (hidden.requires_grad_(), weight.requires_grad_(), targets)
    torch.library.opcheck(operators.linear_logprob.default, (*sides, 0.7, softcap, True, True))
    with torch.no_grad():
        _, entropy, saved = operators.linear_logprob(*sides, 0.7, softcap, True, True)
    slopes = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    backward = (*slopes, *(side.detach() for side in sides), entropy, saved, 0.7, softcap, True, True)
    torch.library.opcheck(operators.linear_logprob_backward.default, backward)
    aims = arguments(PolicyRows(*slopes, None, None, None), None, None, PolicyLoss(entropy_coefficient=0.1), False)
    settings = (*aims, torch.tensor(9.0), 0.7, softcap, True, True, False)
    torch.library.opcheck(operators.linear_policy_loss.default, (*sides, *settings))


def test_the_gradient_may_be_of_another_type_than_the_logits():
    """As on a GPU for bf16 rows: logits in fp32, their gradient in the operand's type, in a buffer of its own."""
    hidden, weight, targets = problem(6, 8, 37)
    g, e = torch.randn(2, 6, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    logprob, entropy = torch.empty(2, 6, device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.float16):
        passes = row_kernels.FusedRows(hidden, weight, 1.0, None, 6, for_gradient=True)
        if dtype != torch.float32:
            passes.gradients = torch.empty_like(passes.logits, dtype=dtype)
        passes.scores(hidden, targets, logprob, entropy)
        gradient, scales = passes.gradient(targets, g, e, entropy)
        assert gradient.dtype == dtype and scales is None
        results.append(gradient)
    torch.testing.assert_close(results[0].half(), results[1], rtol=2e-3, atol=1e-6)


@LIMITED
@shapes
def test_kept_probabilities_become_the_gradient(monkeypatch, rows, size, vocabulary, scale, head, seed):
    """Against fp64, in the operand's type: every probability is rounded twice, the target's 1 - p never."""
    hidden, weight, targets = problem(rows, 2 * size, vocabulary, seed, torch.float16, scale)
    g, e = torch.randn(2, rows, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    g[::3], e[::3] = 0.0, 0.0
    exact = (hidden.double() @ weight.double().T / head[0]).requires_grad_()
    log_p = exact.log_softmax(1)
    want_logprob, want_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    passes = gradient_kernels.KeptRows(hidden, weight, head[0], None, rows, for_gradient=True)
    logprob, entropy = torch.empty(2, rows, device=DEVICE)
    if rows:
        passes.scores(hidden, targets, logprob, entropy)
        torch.testing.assert_close(logprob.double(), want_logprob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)
    # Rows are multiplied by their scales here, as by `Gradients`, or by the kernel.
    for by_entropy, scale_rows in ((e, True), (None, True), (None, False)):
        if rows == 0:
            continue
        monkeypatch.setattr(gradient_kernels, "SCALE_ROWS", scale_rows)
        loss = (g * want_logprob).sum() + (0.0 if by_entropy is None else (by_entropy * want_entropy).sum())
        (want,) = torch.autograd.grad(loss, exact, retain_graph=True)
        passes.scores(hidden, targets, logprob, entropy)
        have, scales = passes.gradient(targets, g, by_entropy, entropy)
        assert have.dtype == torch.float16
        assert (scales is not None) == (scale_rows and by_entropy is None)
        if scales is not None:
            have = have.double() * scales.double()[:, None]
        assert (have[::3] == 0).all()
        slopes = g.abs() + (0.0 if by_entropy is None else by_entropy.abs())
        bound = 2e-3 * (want.abs() + log_p.exp() * slopes[:, None]) / head[0] + 2e-6  # fp16 has no exponents below
        assert ((have.double() - want / head[0]).abs() <= bound).all()


def test_a_sure_row_keeps_its_gradient():
    """If the target has p = 1 - 1e-4, then 1 - p has more digits than a 16-bit probability gives."""
    hidden = torch.ones(1, 8, device=DEVICE, dtype=torch.float16)
    weight = torch.zeros(17, 8, device=DEVICE, dtype=torch.float16)
    weight[3, 0] = 12.0
    target, g = torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE)
    passes = gradient_kernels.KeptRows(hidden, weight, 1.0, None, 1, for_gradient=True)
    logprob, entropy = torch.empty(2, 1, device=DEVICE)
    passes.scores(hidden, target, logprob, entropy)
    gradient, scales = passes.gradient(target, g, None, entropy)
    gradient = gradient * scales[:, None]
    want = -torch.special.expm1(torch.log_softmax((hidden.double() @ weight.double().T), 1)[0, 3])
    assert float(gradient[0, 3]) == pytest.approx(float(want), rel=2e-3)


def test_one_kernel_for_any_number_of_rows():
    """Triton compiles another kernel for a pointer that is not a multiple of 16."""
    hidden, weight, _ = problem(5, 8, 37)
    passes = gradient_kernels.KeptRows(hidden, weight, 1.0, None, 5, for_gradient=True)
    for name in ("kept", "peaks", "partial", "normalizers", "references", "scales"):
        assert getattr(passes, name).data_ptr() % 16 == 0, name


@pytest.mark.parametrize("headroom", [0.0, 3.0, 32.0])
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_whatever_probabilities_are_relative_to(monkeypatch, headroom, scale):
    """For likely and unlikely targets fp32 takes any headroom, with the same loss and gradients."""
    monkeypatch.setattr(sys.modules["searchr1_kernels.linear_policy_loss"], "runs_products", lambda *_: True)
    monkeypatch.setattr(gradient_kernels, "_HEADROOM", headroom)
    related, gradient = [], gradient_kernels.KeptRows.gradient

    def record(self, targets, *arguments):
        matrix, scales = gradient(self, targets, *arguments)
        related.append((self.normalizers[: len(targets), 0] == self.references[: len(targets)]).clone())
        return matrix, scales

    monkeypatch.setattr(gradient_kernels.KeptRows, "gradient", record)
    hidden, weight, targets = problem(30, 24, 70, scale=scale)
    weight[targets[0]] = -2.0 * hidden[0]  # far below all others
    weight[targets[1]] = 2.0 * hidden[1]
    rollout, advantages = reference.linear_logprob(hidden, weight, targets), torch.linspace(-1, 1, 30, device=DEVICE)
    advantages[5:9] = 0.0
    results = []
    for function, dtype in ((linear_policy_loss, torch.float32), (reference.linear_policy_loss, torch.float64)):
        sides = [tensor.to(dtype).clone().requires_grad_() for tensor in (hidden, weight)]
        known = (targets, rollout.to(dtype), advantages.to(dtype))
        loss, metrics = function(*sides, *known, loss=PolicyLoss(kind="cispo"), denominator=30.0)
        loss.backward()
        results.append((loss.detach(), torch.as_tensor(metrics["entropy"]) / 30, sides[0].grad, sides[1].grad))
    # Not 1e-5: the rounding of an unlikely target's logit, some hundreds, enters the ratio, and so the loss times its
    # log-probability.
    assert_close(results[0], results[1], 5e-5)
    related = torch.cat(related)
    assert related[1] and not related[0]


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_of_a_policy_loss(monkeypatch, magnitude):
    """One logit far from the others, as the target and not; and a target that is no token, which is loud."""
    monkeypatch.setattr(sys.modules["searchr1_kernels.linear_policy_loss"], "runs_products", lambda *_: True)
    weight = torch.zeros(19, 8, device=DEVICE)
    weight[:3, 0] = torch.tensor([magnitude, 0.0, 1.0])
    hidden, targets = torch.ones(3, 8, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    options = {"loss": PolicyLoss(kind="reinforce"), "denominator": 1.0}
    results = []
    for function, dtype in ((linear_policy_loss, torch.float32), (reference.linear_policy_loss, torch.float64)):
        sides = [tensor.to(dtype).clone().requires_grad_() for tensor in (hidden, weight)]
        zeros = torch.zeros(3, device=DEVICE, dtype=dtype)
        function(*sides, targets, zeros, zeros + 1, **options)[0].backward()
        results.append([side.grad for side in sides])
    assert all(tensor.isfinite().all() for tensor in results[0])
    assert_close(results[0], results[1], 1e-6)
    # On a CPU the targets are checked first.
    monkeypatch.setattr(sys.modules["searchr1_kernels.checks"], "check_indices", lambda *_: None)
    targets[1] = -100
    side = hidden.clone().requires_grad_()
    loss, _ = linear_policy_loss(side, weight, targets, zeros.float(), zeros.float() + 1, **options)
    loss.backward()
    assert loss.isnan() and side.grad[::2].isfinite().all()
