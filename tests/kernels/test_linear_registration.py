"""The head's operations as torch sees them: its own checks, whole-graph compilation, and no wait for a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from searchr1_kernels import PolicyLoss, _linear_chunks, gae, linear_logprob, linear_policy_loss, policy_objective
from searchr1_kernels._objective_operator import NUM_METRICS, arguments
from torch.autograd import forward_ad

OPERATORS = torch.ops.searchr1_kernels
GSPO = {"loss": PolicyLoss(kind="gspo"), "cu_seqlens": torch.tensor([0, 8, 8, 21])}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make the head use several chunks at test sizes, some kept for the backward pass and some recomputed."""
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 7)
    monkeypatch.setitem(_linear_chunks._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(_linear_chunks._KEEP_BYTES, "cpu", 14 * 13 * 4)


def problem(rows=21):
    """-> hidden, weight, targets, rollout_logprobs, advantages."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 4, generator=generator), torch.randn(13, 4, generator=generator)
    targets = torch.randint(13, (rows,), generator=generator)
    rollout = torch.randn(rows, generator=generator) * 0.3 - 2.5
    return hidden, weight, targets, rollout, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck_linear_logprob(softcap, return_entropy):
    hidden, weight, targets, *_ = problem()
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), targets, 0.7, softcap, return_entropy, True)
    torch.library.opcheck(OPERATORS.linear_logprob.default, arguments)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_linear_logprob_backward(wanted):
    hidden, weight, targets, *_ = problem()
    _, entropy, saved = OPERATORS.linear_logprob(hidden, weight, targets, 0.7, None, True, True)
    gradients = (torch.randn(21), torch.randn(21))
    arguments = (*gradients, hidden, weight, targets, entropy, saved, 0.7, None, *wanted)
    torch.library.opcheck(OPERATORS.linear_logprob_backward.default, arguments)


SHARED = {"loss": PolicyLoss(entropy_coefficient=0.1), "token_rows": torch.tensor([3, 0, 3, 5, 9, *range(16)])}


def aims(options, rollout, advantages):
    """-> what both operators of the policy's loss are told about the objective."""
    tokens = policy_objective.PolicyRows(rollout, advantages, None, None, torch.rand(21))
    return arguments(tokens, options.get("token_rows"), options.get("cu_seqlens"), options["loss"], False)


@pytest.mark.parametrize("denominator", [torch.tensor(9.0, dtype=torch.float64), torch.tensor(9)])
@pytest.mark.parametrize("options", [{"loss": PolicyLoss(entropy_coefficient=0.1)}, SHARED])
def test_opcheck_linear_policy_loss(options, denominator):
    hidden, weight, targets, *of_tokens = problem()
    sides = (hidden.requires_grad_(), weight.requires_grad_())
    settings = (*aims(options, *of_tokens), denominator, 1.0, None, True, True, False)
    torch.library.opcheck(OPERATORS.linear_policy_loss.default, (*sides, targets, *settings))


@pytest.mark.parametrize(
    ("wanted", "kind", "softcap", "rows"),
    [((True, False), "cispo", 5.0, 21), ((False, True), "reinforce", None, 21), ((True, True), "ppo", None, 0)],
)
def test_opcheck_linear_policy_loss_in_other_forms(wanted, kind, softcap, rows):
    hidden, weight, targets, *of_tokens = problem(rows)
    sides = [tensor.requires_grad_(wants) for tensor, wants in zip((hidden, weight), wanted, strict=True)]
    tokens = policy_objective.PolicyRows(*of_tokens, of_tokens[0] + 0.1, of_tokens[0] - 0.1, None)
    loss = PolicyLoss(kind=kind, kl_coefficient=0.1, kl_kind="k2", importance_cap=2.0)
    settings = (*arguments(tokens, None, None, loss, False), torch.tensor(9.0), 0.7, softcap, *wanted, False)
    torch.library.opcheck(OPERATORS.linear_policy_loss.default, (*sides, targets, *settings))


@pytest.mark.parametrize("options", [{"loss": PolicyLoss()}, GSPO, SHARED])
def test_opcheck_policy_objective(options):
    rollout, advantages = problem()[3:]
    scores = (rollout.clone().requires_grad_(), torch.rand(21).requires_grad_())
    torch.library.opcheck(OPERATORS.policy_objective.default, (*scores, *aims(options, rollout, advantages)))


def with_gradients(function, *inputs):
    """-> outputs, and the gradients of the first two inputs."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    outputs = function(hidden, weight, *inputs[2:])
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    return *(output.detach() for output in outputs), hidden.grad, weight.grad


def logprob_and_entropy(hidden, weight, targets):
    return linear_logprob(hidden, weight, targets, temperature=0.7, return_entropy=True)


def logprob_alone(hidden, weight, targets):
    return (linear_logprob(hidden, weight, targets, softcap=4.0),)


def ppo(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(
        hidden, weight, targets, rollout, advantages, ref_logprobs=rollout, denominator=9,
        loss=PolicyLoss(kl_coefficient=0.2, importance_cap=2.0),
    )  # fmt: skip
    return loss, *metrics.values()


def gspo(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=9, **GSPO)
    return loss, *metrics.values()


def ppo_recomputed(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=9, recompute=True)
    return loss, *metrics.values()


def shared_rows(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=9, **SHARED)
    return loss, *metrics.values()


def cispo_from_old_weights(hidden, weight, targets, rollout, advantages):
    loss, metrics = linear_policy_loss(
        hidden, weight, targets, rollout, advantages, old_logprobs=rollout + 0.1, ref_logprobs=rollout - 0.1,
        token_weights=advantages.abs(), mask=targets > 2, denominator=targets.sum(), softcap=4.0,
        loss=PolicyLoss(kind="cispo", kl_kind="k1", kl_coefficient=0.2, importance_cap=2.0, entropy_coefficient=0.1),
    )  # fmt: skip
    return loss, *metrics.values()


def reinforce_on_policy(hidden, weight, targets, rollout, advantages):
    options = {"loss": PolicyLoss(kind="reinforce", importance_cap=2.0), "on_policy": True, "denominator": 9}
    loss, metrics = linear_policy_loss(hidden, weight, targets, rollout, advantages, **options)
    return loss, *metrics.values()


def masked_logprob(hidden, weight, targets):
    return linear_logprob(hidden, weight, targets, mask=targets > 5, return_entropy=True)


def masked_gspo(hidden, weight, targets, rollout, advantages):
    options = {"mask": targets > 5, "denominator": 9, **GSPO}
    loss, metrics = linear_policy_loss(hidden, weight, targets, rollout, advantages, **options)
    return loss, *metrics.values()


@pytest.mark.parametrize(
    "function",
    [
        logprob_and_entropy, logprob_alone, masked_logprob, ppo, ppo_recomputed, gspo, masked_gspo, shared_rows,
        cispo_from_old_weights, reinforce_on_policy,
    ],
)  # fmt: skip
def test_whole_graph_compilation_gives_the_same_bits(function):
    inputs = problem()[: 3 if function in (logprob_and_entropy, logprob_alone, masked_logprob) else 5]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(with_gradients(compiled, *inputs), with_gradients(function, *inputs), strict=True):
        assert torch.equal(ours, eager)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), function(*inputs), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "function", [logprob_and_entropy, logprob_alone, masked_logprob, ppo, ppo_recomputed, reinforce_on_policy]
)
def test_the_same_bits_twice_and_compiled_on_a_gpu(function, dtype):
    """For rows that `_linear_forward_triton` and `_linear_gradient_triton` take, on a GPU that has these kernels."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(700, 64, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(1003, 64, device="cuda", generator=generator).to(dtype)
    targets = torch.randint(1003, (700,), device="cuda", generator=generator)
    inputs = (hidden, weight, targets)
    if function in (ppo, ppo_recomputed, reinforce_on_policy):
        noise, advantages = torch.randn(2, 700, device="cuda", generator=generator)
        inputs = (*inputs, linear_logprob(*inputs) + 0.1 * noise, advantages)
    want = with_gradients(function, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for again in (with_gradients(function, *inputs), with_gradients(compiled, *inputs)):
        assert all(torch.equal(ours, first) for ours, first in zip(again, want, strict=True))


def test_compilation_does_not_depend_on_the_number_of_rows():
    """One graph serves every batch, as no two have the same number of tokens."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(logprob_and_entropy, fullgraph=True, backend=counter, dynamic=True)
    for rows in (29, 43, 50):
        inputs = problem(rows)[:3]
        ours, eager = (with_gradients(function, *inputs) for function in (compiled, logprob_and_entropy))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert counter.frame_count == 1


def test_compilation_does_not_depend_on_the_denominator():
    """No two steps have the same number of policy tokens."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden, weight, targets, rollout, advantages, denominator):
        return (linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=denominator)[0],)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for denominator in (29.0, 43.0, 50.0, 51.0):
        inputs = (*problem(), denominator)
        ours, eager = (with_gradients(function, *inputs) for function in (compiled, loss))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert counter.frame_count == 2  # the first, and one for all others


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "cispo", "reinforce", "gspo"])
def test_nothing_reads_values_off_the_device(kind, shared):
    """Tensors have no values here: reading one or counting a mask's entries raises, and on a GPU it would wait."""
    loss = PolicyLoss(kind=kind, importance_cap=2.0, kl_coefficient=0.1, entropy_coefficient=0.1)
    hidden, weight, targets, *rows = (tensor.to("meta") for tensor in problem(300))
    cu_seqlens = torch.tensor([0, 200, 300], device="meta") if kind == "gspo" else None
    token_rows = torch.zeros(300, dtype=torch.int64, device="meta") if shared else None
    tokens = policy_objective.PolicyRows(*rows, rows[1], None, None)
    aims = arguments(tokens, token_rows, cu_seqlens, loss, False)
    modules = (sys.modules[f"searchr1_kernels.{name}"] for name in ("linear_policy_loss", "_objective_operator"))
    one_pass, objective = (module._forward for module in modules)
    total, metrics, *slopes = objective(*rows, *aims)
    assert total.shape == () and [slope.shape for slope in slopes] == [(300,), (300,)]
    assert metrics.shape == (NUM_METRICS,)
    if kind != "gspo":
        total, metrics, *gradients = one_pass(
            hidden, weight, targets, *aims, torch.tensor(9.0), 1.0, None, True, True, True
        )
        assert total.shape == () and [g.shape for g in gradients] == [hidden.shape, weight.shape]
        assert metrics.shape == (NUM_METRICS,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(dtype):
    """Autocast would round the operands of products to bf16."""
    hidden, weight, targets, rollout, advantages = problem()
    advantages[::2] = 0.0  # rows to be left out
    inputs = (hidden.to(dtype), weight.to(dtype), targets)

    def policy(hidden, weight, targets):
        return linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=9)[:1]

    for function in (logprob_and_entropy, policy):
        plain = with_gradients(function, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast = with_gradients(function, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_gradients_of_gradients_are_refused():
    hidden, weight, targets, rollout, advantages = problem()
    for output in (
        linear_logprob(hidden.requires_grad_(), weight, targets).sum(),
        linear_policy_loss(hidden, weight, targets, rollout, advantages, denominator=1)[0],
    ):
        (gradient,) = torch.autograd.grad(output.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_forward_mode_is_refused(name):
    hidden, weight, targets, rollout, advantages = problem()

    def logprob(**given):
        return linear_logprob(**given, targets=targets)

    def policy(**given):
        return linear_policy_loss(
            **given, targets=targets, rollout_logprobs=rollout, advantages=advantages, denominator=1
        )[0]

    inputs = {"hidden": hidden, "weight": weight}
    for function in (logprob, policy):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor without a tangent"):
            torch.func.jvp(lambda x, f=function: f(**(inputs | {name: x})), (inputs[name],), (inputs[name],))
        with pytest.raises(ValueError, match=f"{name}: expected a tensor without a tangent"), forward_ad.dual_level():
            function(**(inputs | {name: forward_ad.make_dual(inputs[name], inputs[name])}))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0.0, 21.0]), "cu_seqlens: expected torch.int32"),
        (torch.tensor([[0, 21]]), "cu_seqlens: expected shape"),
        (torch.zeros(0, dtype=torch.int64), "cu_seqlens: expected at least one offset"),
        (torch.tensor([0, 20]), "cu_seqlens: expected offsets that rise from 0 to 21"),
    ],
)
def test_compiled_code_names_wrong_offsets_too(cu_seqlens, message):
    """Shape and type are checked during tracing, the numbers at run time."""

    def both(hidden, weight, targets, rollout, advantages, cu_seqlens):
        options = {"loss": PolicyLoss(kind="gspo"), "denominator": 9, "cu_seqlens": cu_seqlens}
        return linear_policy_loss(hidden, weight, targets, rollout, advantages, **options)[0]

    def scan(*inputs):
        return gae(inputs[3], inputs[4], inputs[5])

    for function in (both, scan):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):  # during tracing, dynamo wraps our error in its own
            torch.compile(function, fullgraph=True, backend="aot_eager")(*problem(), cu_seqlens)


@pytest.fixture
def one_rank():
    """A process group of one rank, which FSDP needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Head(torch.nn.Module):
    """A module as a trainer wraps it: weights inside, log-probabilities as arguments."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden, targets, rollout, advantages):
        hidden = hidden.to(self.weight.dtype)
        return linear_policy_loss(hidden, self.weight, targets, rollout, advantages, denominator=9)[0]


@pytest.mark.parametrize("cast", [True, False])
def test_log_probabilities_that_fsdp_rounded_are_refused(one_rank, cast):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    hidden, weight, targets, rollout, advantages = problem()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    module = fully_shard(Head(weight), mesh=mesh, mp_policy=policy)
    if cast:
        with pytest.raises(ValueError, match="rollout_logprobs: expected .*bfloat16.*cast_forward_inputs=False"):
            module(hidden, targets, rollout, advantages)
        return
    want = linear_policy_loss(hidden.bfloat16(), weight.bfloat16(), targets, rollout, advantages, denominator=9)[0]
    assert torch.equal(module(hidden, targets, rollout, advantages), want)
