"""Operators of searchr1_kernels on a GPU, tested as tests/kernels tests them on a CPU.

That is torch's own checks, compilation into one graph, the same bits twice, nothing to do, and a vocabulary of real
size. What Triton kernels compute is tested in tests/kernels.
"""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import (
    PolicyLoss,
    TopKIndex,
    gae,
    group_advantages,
    linear_logprob,
    linear_policy_loss,
    masked_kl,
    masked_moments,
    masked_whiten,
    reference,
    sample_tokens,
    topk_inner_product,
)
from searchr1_kernels._objective_operator import arguments as policy_objective_arguments
from searchr1_kernels.policy_objective import PolicyRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPERATORS = torch.ops.searchr1_kernels
ROWS, SIZE, VOCABULARY = 40, 64, 1000


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def head(rows: int = ROWS, dtype=torch.float32, vocabulary: int = VOCABULARY):
    """-> hidden, weight, targets, rollout_logprobs, advantages."""
    hidden, weight = numbers(rows, SIZE).to(dtype), (0.1 * numbers(vocabulary, SIZE, seed=1)).to(dtype)
    targets = torch.arange(rows).cuda() * 7 % vocabulary
    return hidden, weight, targets, 0.3 * numbers(rows, seed=2) - 6.0, numbers(rows, seed=3)


def draws(rows: int = ROWS, vocabulary: int = 9000):
    """-> logits, randoms."""
    return 3 * numbers(rows, vocabulary), torch.rand(rows, dtype=torch.float64, generator=torch.Generator()).cuda()


def mask(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows).cuda() % 3 != 0


def offsets() -> torch.Tensor:
    return torch.tensor([0, 3, 3, 30, ROWS], dtype=torch.int32).cuda()


def groups(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows).cuda() % 9


def policy_loss(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(
        hidden, weight, targets, rollout, advantages, ref_logprobs=rollout.cos(), denominator=9,
        loss=PolicyLoss(kl_coefficient=0.2, importance_cap=2.0, entropy_coefficient=0.1),
    )  # fmt: skip
    return loss, *metrics.values()


CALLS = {
    "gae": lambda: ((numbers(ROWS), numbers(ROWS, seed=1), offsets(), mask()),
                    lambda r, v, o, m: gae(r, v, o, gamma=0.9, lam=0.8, mask=m)),
    "masked_kl": lambda: ((numbers(ROWS), numbers(ROWS, seed=1), mask()), lambda x, y, m: (masked_kl(x, y, "k3", m),)),
    "group_advantages": lambda: ((numbers(ROWS), groups()), group_advantages),
    "masked_moments": lambda: ((numbers(ROWS), mask()), lambda x, m: (masked_moments(x, m),)),
    "masked_whiten": lambda: ((numbers(ROWS), mask()), lambda x, m: (masked_whiten(x, m),)),
    "topk_inner_product": lambda: ((numbers(4, 32), numbers(500, 32, seed=1).half()),
                                   lambda q, c: topk_inner_product(q, c, 7)),
    "sample_tokens": lambda: (draws(), lambda x, u: sample_tokens(x, u)),
    "sample_tokens top-p": lambda: (draws(), lambda x, u: sample_tokens(x, u, temperature=0.7, top_k=90, top_p=0.9)),
    "linear_logprob": lambda: (head()[:3], lambda *x: linear_logprob(*x, temperature=0.7, return_entropy=True)),
    "linear_logprob bf16": lambda: (head(dtype=torch.bfloat16)[:3], lambda *x: (linear_logprob(*x),)),
    "linear_policy_loss": lambda: (head(), policy_loss),
    "linear_policy_loss bf16": lambda: (head(dtype=torch.bfloat16), policy_loss),
}  # fmt: skip
DIFFERENTIABLE = {name: 2 for name in CALLS if name.startswith("linear")} | {"masked_kl": 1}
each_call = pytest.mark.parametrize("name", CALLS)


def run(name: str, wrap=lambda function: function) -> list[torch.Tensor]:
    """-> outputs, and the gradients of the first inputs if there are any."""
    inputs, function = CALLS[name]()
    count = DIFFERENTIABLE.get(name, 0)
    sides = [tensor.clone().requires_grad_() for tensor in inputs[:count]]
    outputs = wrap(function)(*sides, *inputs[count:])
    if sides:
        sum(output.sum() for output in outputs if output.requires_grad).backward()
    return [output.detach() for output in outputs] + [side.grad for side in sides]


@each_call
def test_the_same_bits_twice(name):
    for one, other in zip(run(name), run(name), strict=True):
        assert torch.equal(one, other)


@each_call
def test_compiles_into_one_graph_with_the_same_bits(name):
    torch._dynamo.reset()
    compiled = run(name, lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, run(name), strict=True):
        assert torch.equal(one, other)


def test_torchs_own_checks():
    hidden, weight, targets, rollout, advantages = head()
    tokens = PolicyRows(rollout, advantages, None, None, None)
    aims = policy_objective_arguments(tokens, None, None, PolicyLoss(), False)
    corpus = numbers(500, 32, seed=1).half()
    arguments = {
        "gae": (rollout, rollout.cos(), offsets(), 0.9, 0.8, mask()),
        "masked_kl": (rollout.clone().requires_grad_(), rollout.cos(), "k3", mask()),
        "group_advantages": (rollout, groups(), True, 1e-6),
        "masked_moments": (rollout, mask()),
        "masked_whiten": (rollout, None, None, 1e-8),
        "topk_inner_product": (numbers(4, 32), corpus, 3, None, TopKIndex(corpus).parts),
        "sample_tokens": (*draws(4), 0.7, 90, 0.9),
        "linear_logprob": (hidden.requires_grad_(), weight.requires_grad_(), targets, 0.7, None, True, True),
        "linear_policy_loss": (hidden, weight, targets, *aims, torch.tensor(9.0), 1.0, None, True, True, False),
    }
    for name, values in arguments.items():
        torch.library.opcheck(getattr(OPERATORS, name).default, values)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_groups_and_whitening_are_those_of_the_oracle(normalize_std):
    rewards = (numbers(200) > 0).float()
    have = group_advantages(rewards, groups(200), normalize_std=normalize_std)
    want = reference.group_advantages(rewards.double().cpu(), groups(200).cpu(), normalize_std=normalize_std)
    torch.testing.assert_close(have[0].double().cpu(), want[0].double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(have[1].cpu(), want[1])
    values = numbers(200)
    kept = values[mask(200)].double()
    expected = ((values.double() - kept.mean()) / kept.std()).masked_fill(~mask(200), 0.0)
    torch.testing.assert_close(masked_whiten(values, mask(200)).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_is_that_of_the_cpu_in_fp64(kind):
    x, y = numbers(200), numbers(200, seed=1)
    results = []
    for left, right in ((x.clone(), y), (x.double().cpu(), y.double().cpu())):
        left.requires_grad_()
        value = masked_kl(left, right, kind, mask(200).to(left.device))
        (gradient,) = torch.autograd.grad(value.sum(), left)
        results.append([tensor.detach().double().cpu() for tensor in (value, gradient)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[700, 3, 0, 512], [20_000, 5]])  # a program per sequence, and one per tile
def test_a_remembered_kernel_of_gae_at_any_address_on_any_stream_and_in_a_graph(monkeypatch, lengths):
    """Against Triton's launcher, to the bit."""
    total = sum(lengths)
    tensors = numbers(total + 4), numbers(total + 4, seed=1), mask(total + 4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    def advantages(begin: int, directly: bool = True) -> torch.Tensor:
        monkeypatch.setattr("searchr1_kernels._gae_triton.LAUNCH_DIRECTLY", directly)
        rewards, values, kept = (tensor[begin : begin + total] for tensor in tensors)
        return torch.stack(gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95, mask=kept))

    wanted = [advantages(begin, directly=False) for begin in range(4)]  # now the kernel is remembered
    for begin, want in enumerate(wanted):
        assert torch.equal(advantages(begin), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        tensors[0].neg_()  # a kernel on another stream would be too early
        negated = advantages(1)
        tensors[0].neg_()
    torch.cuda.current_stream().wait_stream(stream)
    assert not torch.equal(negated, wanted[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = advantages(1)
    tensors[0].neg_()
    graph.replay()
    assert torch.equal(recorded, negated)


def test_a_remembered_kernel_of_gae_is_one_for_its_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = numbers(ROWS), numbers(ROWS, seed=1), offsets(), mask()
    want = torch.stack(gae(*inputs[:3], mask=inputs[3]))
    for device in (1, 0, 1):
        moved = [tensor.to(f"cuda:{device}") for tensor in inputs]
        assert torch.equal(torch.stack(gae(*moved[:3], mask=moved[3])).to(0), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_do(dtype):
    hidden, weight, targets, rollout, advantages = head(0, dtype)
    assert linear_logprob(hidden, weight, targets).shape == (0,)
    hidden.requires_grad_(), weight.requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    loss, _ = linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=3)
    (loss + logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, SIZE) and (weight.grad == 0).all()
    nothing = numbers(0)
    assert gae(nothing, nothing, torch.zeros(3, dtype=torch.int32).cuda())[0].shape == (0,)
    assert masked_kl(nothing, nothing).shape == masked_whiten(nothing).shape == (0,)
    assert group_advantages(nothing, torch.zeros(0, dtype=torch.int64).cuda())[0].shape == (0,)
    assert topk_inner_product(numbers(0, 32), numbers(50, 32), 3)[1].shape == (0, 3)


SETTINGS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (0.0, 0, 1.0),
    (1.0, 0, 0.95),
    (1.0, 20, 1.0),
    (0.8, 50, 0.9),
    (1.0, 3000, 0.5),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_samples_of_a_real_vocabulary(temperature, top_k, top_p, spread):
    """The oracle's tokens except some that rounding decides; the same bits alone, from a view and in a CUDA graph."""
    logits, randoms = draws(64, 151_936)
    logits *= spread
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids, logprobs = sample_tokens(logits, randoms, **options)
    want, exact = reference.sample_tokens(logits.double(), randoms, **options)
    assert (ids != want).sum() <= 6  # in flat rows a token is worth 7e-6, and sums are good to about 1e-7
    same = ids == want
    torch.testing.assert_close(logprobs[same].double(), exact[same], rtol=1e-6, atol=2e-6)
    for rows in (slice(0, 1), slice(20, 44), slice(63, 64)):
        for alone, together in zip(sample_tokens(logits[rows], randoms[rows], **options), (ids, logprobs), strict=True):
            assert torch.equal(alone, together[rows])
    wider = torch.cat([logits[:3, :1], logits[:3]], dim=1)[:, 1:]
    assert torch.equal(sample_tokens(wider, randoms[:3], **options)[1], logprobs[:3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = sample_tokens(logits, randoms, **options)
    randoms.copy_(randoms.flip(0))
    logits.copy_(logits.flip(0))
    graph.replay()
    assert torch.equal(recorded[0], ids.flip(0)) and torch.equal(recorded[1], logprobs.flip(0))


def test_a_real_vocabulary_twice_and_a_row_alone():
    """Without gradients, a row's numbers do not depend on its neighbours; with gradients, the same call repeats."""
    hidden, weight, targets, *_ = head(200, torch.bfloat16, 151_936)
    together = torch.stack(linear_logprob(hidden, weight, targets, return_entropy=True))
    for rows in (slice(0, 1), slice(199, 200), slice(30, 131)):
        some = torch.stack(linear_logprob(hidden[rows], weight, targets[rows], return_entropy=True))
        assert torch.equal(some, together[:, rows])
    gradients = []
    for _ in range(2):
        sides = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
        gradients.append(torch.autograd.grad(linear_logprob(*sides, targets).sum(), sides))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
