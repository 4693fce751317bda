"""The head on a GPU at real width: a vocabulary of 151,936, mostly in bf16, and the memory that takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from searchr1_kernels import PolicyLoss, _linear_chunks, linear_logprob, linear_policy_loss, reference


def plain_scores(hidden, weight, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """-> log-probability and entropy, [N] fp32 each, by the library's product with fp32 sums and torch's softmax.

    The sums are those of its matrix units. For operands of this type plain torch gets no nearer to the truth: with
    logits rounded to bf16 it would be a thousand times as far off.
    """
    options = {"out_dtype": torch.float32} if hidden.dtype == torch.bfloat16 else {}
    distribution = F.log_softmax(torch.mm(hidden, weight.T, **options), dim=-1)
    return distribution.gather(1, targets[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.03, 0.3])  # flat and peaky heads
def test_scores_and_gradients_at_real_width(scale, dtype):
    """Scores are off by at most 2e-5 or three times as much as plain torch's, gradients by twice as much.

    Log-probabilities and entropies may be off by 2e-5 or, where fp32 sums do not allow that, by three times as much as
    plain torch's on the same device. Gradients may be off by at most twice as much as plain torch's in the type of the
    operands.

    A peaky head has logits of 50, whose fp32 sums are not good to 2e-5. A tensor core of Hopper aligns 16 products and
    the sum so far to the largest of them, with two bits more than fp32 has, and cuts off the rest
    (north-numerical-computing/MATLAB-tensor-core). Simulated that way, log-probabilities of this test's peaky head are
    off by 5e-5, ours by as much as a library's, nearly all of them upwards. Summed in fp32, one after the other, they
    are off by 3e-5.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 1024, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(151_936, 1024, device="cuda", generator=generator) * scale).to(dtype)
    targets = torch.randint(151_936, (300,), device="cuda", generator=generator)
    results = {}
    for name, function, computed in (
        ("ours", linear_logprob, dtype),
        ("torch", reference.linear_logprob, dtype),
        ("exact", reference.linear_logprob, torch.float64),
    ):
        rows, head = (tensor.detach().to(computed).requires_grad_() for tensor in (hidden, weight))
        logprob, entropy = function(rows, head, targets, return_entropy=True)
        (logprob.sum() - 0.1 * entropy.sum()).backward()
        results[name] = [tensor.detach().double() for tensor in (logprob, entropy, rows.grad, head.grad)]
    without_gradient = linear_logprob(hidden, weight, targets, return_entropy=True)
    scores = (results["ours"][:2], without_gradient, plain_scores(hidden, weight, targets), results["exact"][:2])
    for ours, alone, plain, exact in zip(*scores, strict=True):
        allowed = max(2e-5, 3 * float((plain.double() - exact).abs().max()))
        assert float((ours - exact).abs().max()) <= allowed
        assert float((alone.double() - exact).abs().max()) <= allowed
    for ours, plain, exact in zip(*(results[name][2:] for name in ("ours", "torch", "exact")), strict=True):
        assert float((ours - exact).norm()) <= 2 * float((plain - exact).norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_targets_that_are_all_but_certain(dtype, softcap):
    """Differences of logits are as good as plain torch's, and so are gradients; the target's gradient is 1 - p.

    What the sums of a matrix unit lack is in the target's logit and in the others' alike.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 1024, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(151_936, 1024, device="cuda", generator=generator) * 0.03).to(dtype)
    targets = torch.randperm(151_936, device="cuda", generator=generator)[:300]
    sizes = torch.linspace(0.008, 0.03, 300, device="cuda")[:, None]  # logits of 8 to 30: p from almost 0 to almost 1
    weight[targets] = (hidden.float() * sizes).to(dtype)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets, softcap=softcap)
    assert float(exact.max()) > -1e-6 and float(exact.min()) < -1.0
    plain = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if softcap is not None:
        plain = softcap * torch.tanh(plain / softcap)
    plain = F.log_softmax(plain, dim=-1).gather(1, targets[:, None])[:, 0]
    allowed = 3 * (plain.double() - exact).abs() + 4e-6  # two roundings of a logit of 30
    rows, head = hidden.requires_grad_(), weight.requires_grad_()
    ours = {"scores": linear_logprob(rows.detach(), head.detach(), targets, softcap=softcap)}
    ours["training"] = linear_logprob(rows, head, targets, softcap=softcap)
    for name, logprob in ours.items():
        error = (logprob.detach().double() - exact).abs()
        assert bool((error <= allowed).all()), f"{name}: {float((error - allowed).max()):.1e} more than allowed"
    # This loss of one row is minus its log-probability; the fused operator shows it in no other way.
    for row in range(0, 300, 60):
        place, zeros = slice(row, row + 1), torch.zeros(1, device="cuda")
        loss, _ = linear_policy_loss(
            rows[place], head, targets[place], zeros, zeros + 1, loss=PolicyLoss(kind="reinforce"), denominator=1.0,
            softcap=softcap, on_policy=True,
        )  # fmt: skip
        assert float((loss.detach().double() + exact[row]).abs()) <= float(allowed[row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["ppo", "cispo", "reinforce", "gspo"])
@pytest.mark.parametrize("scale", [0.03, 0.3])  # the peaky head's targets are unlikelier than 2^-32
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.01])
def test_bf16_policy_loss_at_real_width(monkeypatch, kind, scale, entropy_coefficient):
    """The loss is off by 2e-5, or by three times what its objective makes of plain torch's log-probabilities.

    For a peaky head their errors enter cispo's ratio, which multiplies them.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 1024, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(151_936, 1024, device="cuda", generator=generator) * scale).bfloat16()
    targets = torch.randint(151_936, (300,), device="cuda", generator=generator)
    noise, advantages = torch.randn(2, 300, device="cuda", generator=generator)
    rollout = linear_logprob(hidden, weight, targets) + 0.1 * noise
    options = {"loss": PolicyLoss(kind=kind, entropy_coefficient=entropy_coefficient), "denominator": 300.0}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 100, 300], device="cuda")
    results = {}
    for name, function, dtype in (
        ("ours", linear_policy_loss, torch.bfloat16),
        ("torch", reference.linear_policy_loss, torch.bfloat16),
        ("exact", reference.linear_policy_loss, torch.float64),
    ):
        known = torch.float64 if dtype == torch.float64 else torch.float32
        rows, head = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight))
        loss, _ = function(rows, head, targets, rollout.to(known), advantages.to(known), **options)
        loss.backward()
        results[name] = [tensor.detach().double() for tensor in (loss, rows.grad, head.grad)]
    plain = tuple(scores.double() for scores in plain_scores(hidden, weight, targets))
    monkeypatch.setattr(reference, "linear_logprob", lambda *_, **__: plain)
    known = (hidden, weight, targets, rollout.double(), advantages.double())
    of_plain, _ = reference.linear_policy_loss(*known, **options)
    exact = results["exact"][0]
    assert float((results["ours"][0] - exact).abs()) <= max(2e-5, 3 * float((of_plain - exact).abs()))
    for ours, plain, exact in zip(*(results[name][1:] for name in ("ours", "torch", "exact")), strict=True):
        assert float((ours - exact).norm()) <= 2 * float((plain - exact).norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", ["linear_logprob", "linear_policy_loss", "recompute", "30 %"])
def test_memory_at_real_width(function):
    """16k rows by 151,936 in no more than 1.5 GB, both gradients included."""
    hidden = torch.randn(16_384, 2048, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(151_936, 2048, device="cuda") * 0.03).bfloat16().requires_grad_()
    targets, zeros = torch.randint(151_936, (16_384,), device="cuda"), torch.zeros(16_384, device="cuda")
    torch.mm(hidden[:16].detach(), weight[:16].detach().T)  # 32 MiB that cuBLAS keeps from its first product on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if function == "linear_logprob":
        linear_logprob(hidden, weight, targets).sum().backward()
    elif function == "30 %":
        rows, some = torch.arange(0, 16_384, 10, device="cuda").repeat_interleave(3), zeros[:4917]
        linear_policy_loss(hidden[rows], weight, targets[rows], some, some + 1, denominator=1)[0].backward()
    else:
        options = {"denominator": 1, "recompute": function == "recompute"}
        linear_policy_loss(hidden, weight, targets, zeros, zeros + 1, **options)[0].backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.5e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", ["linear_logprob", "linear_policy_loss"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(700, 151_936), (700, 32_003), (5, 151_936)])
def test_own_products_agree_with_a_library_s(monkeypatch, function, rows, vocabulary):
    """Several chunks and one, a vocabulary that no tile divides, rows without a gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, 1024, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, 1024, device="cuda", generator=generator) * 0.1).bfloat16()
    targets = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    g = torch.randn(rows, device="cuda", generator=generator)
    g[::3] = 0.0
    monkeypatch.setattr(_linear_chunks, "_KEPT_BYTES", 512 * vocabulary)  # 256 rows at a time
    for coefficient in (0.0, 0.1):
        results = []
        for own in (True, False):
            monkeypatch.setattr(_linear_chunks, "OWN_PRODUCTS", own)
            sides = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            if function == "linear_logprob":
                logprob, entropy = linear_logprob(*sides, targets, return_entropy=True)
                loss = (g * logprob).sum() - (coefficient * entropy.sum() if coefficient else 0.0)
            else:
                objective = PolicyLoss(kind="reinforce", entropy_coefficient=coefficient)
                loss, _ = linear_policy_loss(*sides, targets, g * 0, g, loss=objective, denominator=1.0)
            loss.backward()
            results.append([tensor.detach().double() for tensor in (loss, *(side.grad for side in sides))])
        for have, want in zip(*results, strict=True):
            assert float((have - want).norm()) <= 6e-3 * float(want.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [256, 2048, 2304])  # one chunk; eight, summed in bf16; nine, in fp32
def test_a_weight_s_gradient_in_chunks(monkeypatch, rows):
    """It is at most twice as far off as plain torch's in bf16."""
    monkeypatch.setattr(_linear_chunks, "_KEPT_BYTES", 256 * 151_936)  # 128 rows, and twice as many
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, 1024, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(151_936, 1024, device="cuda", generator=generator) * 0.1).bfloat16()
    chunks = _linear_chunks.chunk_ranges(hidden, weight, for_gradient=True, kept=True)
    assert [chunk.stop - chunk.start for chunk in chunks] == [256] * (rows // 256)
    targets = torch.randint(151_936, (rows,), device="cuda", generator=generator)
    advantages = torch.randn(rows, device="cuda", generator=generator)
    options, gradients = {"loss": PolicyLoss(kind="reinforce"), "denominator": 1.0}, {}
    for name, function, dtype in (
        ("ours", linear_policy_loss, torch.bfloat16),
        ("torch", reference.linear_policy_loss, torch.bfloat16),
        ("exact", reference.linear_policy_loss, torch.float64),
    ):
        head = weight.to(dtype, copy=True).requires_grad_()
        known = advantages.double() if dtype == torch.float64 else advantages
        function(hidden.to(dtype), head, targets, 0 * known, known, **options)[0].backward()
        gradients[name] = head.grad.double()
    off = {name: float((gradients[name] - gradients["exact"]).norm()) for name in ("ours", "torch")}
    assert off["ours"] <= 2 * off["torch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_backward_pass_that_has_nothing_to_do():
    """It makes no second weight gradient, of 622 MB; under `retain_graph` the gradient is right, and a new tensor."""
    hidden = torch.randn(1024, 2048, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(151_936, 2048, device="cuda") * 0.03).bfloat16().requires_grad_()
    targets, zeros = torch.randint(151_936, (1024,), device="cuda"), torch.zeros(1024, device="cuda")
    loss, _ = linear_policy_loss(hidden, weight, targets, zeros, zeros + 1, denominator=1024)
    (kept,) = torch.autograd.grad(3.0 * loss, weight, retain_graph=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= 1e8
    assert float((kept.double() - 3.0 * weight.grad.double()).norm()) <= 3e-3 * float(kept.double().norm())
