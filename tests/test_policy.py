"""The policy's and the critic's updates against plain autograd, and their guards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from searchr1_kernels import linear_logprob, reference

from searchr1_fast.critic import Critic
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.packing import pack
from searchr1_fast.policy import Learner, Policy, TrainingDiverged, padding_batch

PIECES = [(False, 5), (True, 4), (False, 6), (True, 3)]  # prompt, turn, observation, turn


@pytest.fixture
def ranks() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def make_policy(make_config, make_decoder, ranks):
    """algorithm settings -> a policy over a random decoder; with a KL, it has another random decoder as reference."""

    def make(rollout=None, optimizer=None, **algorithm) -> Policy:
        config = make_config(algorithm=algorithm, rollout=rollout or {}, optimizer=optimizer or {})
        reference = make_decoder(1) if algorithm.get("kl_coefficient") else None
        return Policy(make_decoder(0), config, ranks, reference)

    return make


@pytest.fixture
def trajectories(make_trajectory):
    """Five trajectories of different lengths; in one the policy wrote nothing."""
    lengths = (
        [(False, 7), (True, 2)],
        PIECES,
        [(False, 3), (True, 9)],
        [(False, 6)],
        [(False, 4), (True, 1), (False, 8)],
    )
    return [make_trajectory(seed, pieces) for seed, pieces in enumerate(lengths)]


ADVANTAGES = [1.5, -0.5, 0.25, 2.0, -1.0]


def gradients_of(learner: Learner, update) -> dict[str, torch.Tensor]:
    """The gradients that `update` accumulates, without the optimizer's step."""
    held = learner.step
    learner.step = lambda: 0.0
    try:
        update()
    finally:
        learner.step = held
    gradients = {name: parameter.grad.clone() for name, parameter in learner.parameters.items()}
    learner.optimizer.zero_grad()
    return gradients


def reference_gradients(decoder, terms) -> dict[str, torch.Tensor]:
    """Gradients of the sum of term(log-probs of a trajectory's tokens [L-1], index), each over its full logits."""
    total = torch.zeros(())
    for index, (trajectory, term) in enumerate(terms):
        ids = torch.from_numpy(trajectory.token_ids)
        logits = decoder.logits(ids, torch.tensor([0, len(ids)]))[:-1]
        total = total + term(torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0], index)
    decoder.zero_grad()
    total.backward()
    gradients = {f"decoder.{name}": parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    return gradients


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=2e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_full_softmax(make_policy, trajectories, temperature):
    policy = make_policy(rollout={"temperature": temperature})
    (batch,) = pack(trajectories, ADVANTAGES, 1000)
    logprobs, entropy = policy.module(batch, linear_logprob, return_entropy=True)
    decoder = policy.module.decoder
    table = torch.log_softmax(decoder.logits(batch.token_ids, batch.cu_seqlens) / temperature, -1)[batch.policy_index]
    torch.testing.assert_close(logprobs, table.gather(1, batch.targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1))


@pytest.mark.parametrize("mask_observations", [True, False])
def test_gradient_is_that_of_the_chosen_tokens(make_policy, trajectories, mask_observations):
    """REINFORCE in plain autograd, over the policy's tokens or over everything after the prompt."""
    policy = make_policy(importance_cap=0)
    masks = [
        torch.from_numpy(t.loss_mask[1:]) if mask_observations else torch.arange(1, len(t.token_ids)) >= t.prompt_length
        for t in trajectories
    ]
    count = sum(int(mask.sum()) for mask in masks)
    expected = reference_gradients(
        policy.module.decoder,
        [(t, lambda logprobs, i: -ADVANTAGES[i] * logprobs[masks[i]].sum() / count) for t in trajectories],
    )
    batches = pack(trajectories, ADVANTAGES, 1000, mask_observations=mask_observations)
    assert_same(gradients_of(policy, lambda: policy.update(batches, count)), expected)


@pytest.mark.parametrize("on_policy", [True, False])
def test_microbatches_and_padding_change_nothing(make_policy, trajectories, on_policy):
    policy = make_policy(kl_coefficient=0.1, entropy_coefficient=0.01)

    def gradients(batches):
        references = policy.reference_logprobs(batches)
        return gradients_of(policy, lambda: policy.update(batches, 19, references, on_policy))

    whole = pack(trajectories, ADVANTAGES, 1000)
    assert sum(batch.num_policy_tokens for batch in whole) == 19
    assert len(whole) == 1
    parts = [padding_batch(), *pack(trajectories, ADVANTAGES, 20), padding_batch()]
    assert len(parts) > 4
    assert_same(gradients(parts), gradients(whole))


def test_kl_gradient_is_that_of_k3_to_the_reference(make_policy, trajectories):
    policy = make_policy(kl_coefficient=0.3)
    (batch,) = pack(trajectories, [0.0] * 5, 1000)  # no advantages, so only the KL remains
    reference = policy.reference.decoder

    def k3(logprobs, index):
        ids = torch.from_numpy(trajectories[index].token_ids)
        with torch.no_grad():
            table = torch.log_softmax(reference.logits(ids, torch.tensor([0, len(ids)]))[:-1], -1)
        difference = table.gather(1, ids[1:, None])[:, 0] - logprobs
        difference = difference[torch.from_numpy(trajectories[index].loss_mask[1:])]
        return 0.3 * (difference.exp() - difference - 1).sum() / 19

    expected = reference_gradients(policy.module.decoder, [(t, k3) for t in trajectories])
    references = policy.reference_logprobs([batch])
    assert_same(gradients_of(policy, lambda: policy.update([batch], 19, references)), expected)
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("mask_observations", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_loss_is_that_of_the_plain_head(monkeypatch, make_policy, make_trajectory, on_policy, mask_observations):
    """Gradients formed in the forward pass, for rows that sequences share, against autograd over all logits."""
    policy = make_policy(kl_coefficient=0.1, entropy_coefficient=0.01, rollout={"temperature": 0.7})
    trajectories = [make_trajectory(seed, PIECES) for seed in range(4)]
    for trajectory in trajectories[1:]:  # all equal up to the second turn
        trajectory.token_ids[:-3] = trajectories[0].token_ids[:-3]
        trajectory.rollout_logprobs[trajectory.loss_mask] -= 0.2
    (batch,) = pack(trajectories, ADVANTAGES[:4], 1000, mask_observations=mask_observations)
    assert len(batch.scored_rows) < batch.num_policy_tokens
    (references,) = policy.reference_logprobs([batch])
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("searchr1_fast.losses.linear_policy_loss", reference.linear_policy_loss)
        loss, metrics = policy.loss(batch, 19, references, on_policy)
        policy.backward(loss)
        gradients = {name: parameter.grad.clone() for name, parameter in policy.parameters.items()}
        policy.optimizer.zero_grad()
        results.append((float(loss.detach()), {name: float(value) for name, value in metrics.items()}, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-5)
    assert_same(results[0][2], results[1][2])


def test_without_a_kl_there_is_no_reference(make_policy):
    assert make_policy().reference is None


def test_update_reports_the_norm_and_clips_to_it(make_policy, trajectories):
    policy = make_policy(optimizer={"learning_rate": 1.0, "max_grad_norm": 0.01})
    batches = pack(trajectories, ADVANTAGES, 1000)
    gradients = gradients_of(policy, lambda: policy.update(batches, 19))
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    policy.optimizer = torch.optim.SGD(policy.parameters.values(), lr=1.0)  # its step is the gradient
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    _, norm = policy.update(batches, 19)
    assert norm == pytest.approx(float(expected), rel=1e-4)
    moved = torch.cat([(before[name] - parameter.detach()).flatten() for name, parameter in policy.parameters.items()])
    assert float(moved.norm()) == pytest.approx(0.01 * policy.last_learning_rate, rel=1e-3)


def test_warm_up_is_linear_then_constant(make_policy, trajectories):
    policy = make_policy(optimizer={"learning_rate": 8e-4, "warmup_steps": 4})
    batches = pack(trajectories, ADVANTAGES, 1000)
    rates = []
    for _ in range(6):
        policy.update(batches, 19)
        rates.append(policy.last_learning_rate)
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4])


def test_the_schedule_follows_the_updates_that_were_applied(make_policy, trajectories):
    """A skipped gradient does not advance it, and a resumed policy continues where it was."""
    optimizer = {"learning_rate": 8e-4, "warmup_steps": 0, "warmup_ratio": 0.5, "schedule": "linear"}  # of two updates
    policy, resumed = make_policy(optimizer=optimizer), make_policy(optimizer=optimizer)
    (good,) = pack(trajectories, ADVANTAGES, 1000)
    bad = replace(good, advantages=torch.full_like(good.advantages, float("nan")))
    policy.update([good], 19)
    policy.update([bad], 19)
    resumed.load_state_dict(policy.state_dict())
    for learner in (policy, resumed):
        rates = []
        for _ in range(3):
            learner.update([good], 19)
            rates.append(learner.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([8e-4, 0.0, 0.0])


def test_a_gradient_that_is_not_finite_is_skipped_and_three_in_a_row_end_the_run(make_policy, trajectories):
    policy = make_policy()
    (good,) = pack(trajectories, ADVANTAGES, 1000)
    bad = replace(good, advantages=torch.full_like(good.advantages, float("nan")))
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    for _ in range(2):
        policy.update([bad], 19)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.parameters.items())
    assert (policy.num_updates, policy.num_skipped, policy.optimizer.state) == (0, 2, {})
    policy.update([good], 19)  # ends the row
    policy.update([bad], 19)
    policy.update([bad], 19)
    policy.raise_if_diverged()
    policy.update([bad], 19)
    expected = r"3 times in a row, after 1 updates.*'decoder\..*the weights are finite.*see the file"
    with pytest.raises(TrainingDiverged, match=expected):
        policy.raise_if_diverged("; see the file")
    assert all(parameter.isfinite().all() for parameter in policy.parameters.values())


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(make_policy, trajectories):
    policy = make_policy()
    (batch,) = pack(trajectories, ADVANTAGES, 1000)
    loss = policy.loss
    policy.loss = lambda *arguments: (loss(*arguments)[0] + float("inf"), {})
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    assert not math.isfinite(policy.update([batch], 19)[1])
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.parameters.items())
    assert policy.diagnosis == "the loss, or the norm of all gradients together; the weights are finite"
    policy.loss = loss
    assert math.isfinite(policy.update([batch], 19)[1])  # nothing of the bad update remains
    assert (policy.num_updates, policy.num_skipped, policy.skipped_in_a_row) == (1, 1, 0)


def test_bf16_computes_in_bf16_over_fp32_masters(make_config, make_decoder, trajectories):
    """In a group of one rank: FSDP's mixed precision, and a replica in the compute type for the rollout."""
    batches = pack(trajectories, ADVANTAGES, 30)
    with process("cpu") as ranks:
        policy = Policy(make_decoder(0), make_config(model={"dtype": "bfloat16"}), ranks)
        exact = Policy(make_decoder(0), make_config(), ranks)
        for batch in batches:
            logprobs = policy.module(batch, linear_logprob)
            assert logprobs.dtype == torch.float32
            torch.testing.assert_close(logprobs, exact.module(batch, linear_logprob), atol=0.05, rtol=0)
        assert {p.dtype for p in policy.replica.parameters()} == {torch.bfloat16}
        assert exact.replica is exact.module.decoder
        norm, expected = policy.update(batches, 19)[1], exact.update(batches, 19)[1]
        assert norm == pytest.approx(expected, rel=0.05)
        assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
        policy.sync_replica()
        for (name, replica), parameter in zip(
            policy.replica.named_parameters(), policy.module.decoder.parameters(), strict=True
        ):
            assert torch.equal(replica, parameter.full_tensor().bfloat16()), name
    assert not torch.distributed.is_initialized()


def test_critic_begins_at_zero_and_learns_returns(make_config, make_decoder, trajectories, ranks):
    config = make_config(algorithm={"critic_learning_rate": 3e-3, "value_clip": 0.0})
    critic = Critic(make_decoder(0), config, ranks)
    batches = pack(trajectories, ADVANTAGES, 30)
    values = critic.values(batches)
    assert [len(v) for v in values] == [batch.num_policy_tokens for batch in batches]
    assert all((value == 0).all() for value in values)
    returns = [batch.advantages for batch in batches]  # any target that differs between trajectories
    first, last = None, None
    for _ in range(60):
        metrics, _ = critic.update(batches, returns, critic.values(batches), 19)
        last = float(metrics["value_loss"])
        first = last if first is None else first
    assert first == pytest.approx(0.5 * sum(float((r**2).sum()) for r in returns), rel=1e-4)
    assert last < 0.01 * first
    errors = torch.cat([v - r for v, r in zip(critic.values(batches), returns, strict=True)])
    assert errors.abs().max() < 0.3


def test_critic_values_do_not_see_the_token_they_precede(make_config, make_decoder, trajectories, ranks):
    """V(state) is read one row before the token, so another last token does not change it."""
    critic = Critic(make_decoder(0), make_config(), ranks)
    torch.nn.init.normal_(critic.module.value_head.weight)
    (batch,) = pack([trajectories[2]], [0.0], 1000)
    token_ids = batch.token_ids.clone()
    token_ids[-1] = (token_ids[-1] + 1) % 200
    changed = replace(batch, token_ids=token_ids)
    assert torch.equal(critic.values([batch])[0], critic.values([changed])[0])
    token_ids[-2] = (token_ids[-2] + 1) % 200
    assert not torch.equal(critic.values([batch])[0], critic.values([changed])[0])


def test_critic_gives_fsdp_no_view(make_config, make_decoder, trajectories, ranks):
    """Not even where sequences share a prefix: FSDP attaches hooks to a module's outputs, and warns of views."""
    critic = Critic(make_decoder(0), make_config(), ranks)
    (batch,) = pack([trajectories[0]] * 2, [1.0, -1.0], 100)
    assert batch.prefixes is not None
    assert not critic.module(batch)._is_view()
