"""The examples of kernels/README.md run, and those for other trainers agree with what they replace."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import searchr1_kernels
import torch
from torch import nn

README = Path(__file__).parents[2] / "kernels" / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(code: str) -> dict:
    namespace: dict = {}
    exec(compile(code, str(README), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    run(EXAMPLES[number])


def test_every_function_has_an_example():
    """Except `reference` and what a search gives back."""
    used = set(re.findall(r"\b(\w+)\(", "".join(EXAMPLES)))
    assert set(searchr1_kernels.__all__) - used == {"reference", "TopKSearch", "Hits", "Settled"}


def test_the_plain_loop_takes_the_step_of_the_logits():
    """Rows, targets and gradient match `model(…).logits` and the textbook's loss, on the loop's last update."""
    (code,) = (code for code in EXAMPLES if "LlamaForCausalLM" in code)
    assert code.count("    optimizer.zero_grad()\n") == code.count("    optimizer.step()\n") == 1
    loop = SimpleNamespace(**run(code.replace("    optimizer.zero_grad()\n", "").replace("    optimizer.step()\n", "")))
    assert 0 < len(loop.rows) < loop.loss_mask.numel()
    gradients = {name: parameter.grad.clone() for name, parameter in loop.model.named_parameters()}
    loop.optimizer.zero_grad()
    logits = loop.model(loop.input_ids, attention_mask=loop.attention_mask).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, loop.input_ids[:, 1:, None]).squeeze(-1)
    trained = loop.loss_mask & loop.keep[:, None]
    assert int(trained.sum()) == len(loop.rows)
    loss = -(loop.advantages[:, None] * logprobs)[trained].sum() / trained.sum()
    (2 * loss).backward()  # nothing has moved, so both updates are the same and their ratios are 1
    for name, parameter in loop.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.fixture(scope="module")
def verl():
    """The functions of the example for verl-style trainers."""
    (code,) = (code for code in EXAMPLES if "compute_log_prob" in code)
    return SimpleNamespace(**run(code))


def test_log_probs_are_those_of_the_logits(verl):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)

        def model(self, input_ids, attention_mask, position_ids):
            return SimpleNamespace(last_hidden_state=self.embed(input_ids).cumsum(1))

    torch.manual_seed(0)
    model, input_ids = Model(), torch.randint(20, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    responses = input_ids[:, -5:]
    entropy, log_probs = verl.compute_log_prob(model, input_ids, attention_mask, None, responses, 0.8)
    logits = model.lm_head(model.model(input_ids, None, None).last_hidden_state)[:, -6:-1] / 0.8
    distribution = logits.log_softmax(-1)
    mask = attention_mask[:, -5:]
    want = distribution.gather(-1, responses[..., None]).squeeze(-1)
    torch.testing.assert_close(log_probs, want * mask)
    torch.testing.assert_close(entropy, -(distribution.exp() * distribution).sum(-1) * mask)


def test_gae_is_the_loop_over_time(verl):
    generator = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(2, 4, 12, generator=generator)
    mask = (torch.rand(4, 12, generator=generator) < 0.7).float()
    rewards = rewards * mask
    advantages, returns = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    next_value, last, plain = torch.zeros(4), torch.zeros(4), torch.zeros(4, 12)
    for t in reversed(range(12)):
        current = rewards[:, t] + 0.9 * next_value - values[:, t] + 0.9 * 0.8 * last
        next_value = torch.where(mask[:, t] > 0, values[:, t], next_value)
        last = torch.where(mask[:, t] > 0, current, last)
        plain[:, t] = last
    torch.testing.assert_close(returns, (plain + values) * mask)
    kept = plain[mask > 0]
    want = (plain - kept.mean()) / (kept.var() + 1e-8).sqrt()
    torch.testing.assert_close(advantages, want * mask, rtol=1e-4, atol=1e-5)


def test_grpo_advantages_are_the_groups_own(verl):
    rewards = torch.zeros(5, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5])
    mask = torch.tensor([[1.0, 1, 0]]).expand(5, 3)
    advantages, returns = verl.compute_grpo_outcome_advantage(rewards, mask, np.array(["a", "a", "a", "b", "b"]))
    scores = torch.tensor([1.0, 0.0, 1.0])
    want = torch.cat([(scores - scores.mean()) / scores.std(), torch.zeros(2)])
    torch.testing.assert_close(advantages, want[:, None] * mask, rtol=1e-4, atol=1e-5)
    assert returns is advantages
    rewards = torch.eye(3)[:, :2] * 4  # two of one group, and one alone
    unscaled, _ = verl.compute_grpo_outcome_advantage(rewards, torch.ones(3, 2), np.array([3, 3, 8]), 1e-6, False)
    torch.testing.assert_close(unscaled, torch.zeros(3, 2))
    rewards[1] = 0
    unscaled, _ = verl.compute_grpo_outcome_advantage(rewards, torch.ones(3, 2), np.array([3, 3, 8]), 1e-6, False)
    torch.testing.assert_close(unscaled, torch.tensor([[2.0, 2], [-2, -2], [0, 0]]))
