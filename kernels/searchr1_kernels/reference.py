"""The plain form of every operation: a few lines each, in the precision of the inputs, differentiable by autograd.

This is what tests and benchmarks compare with; give it fp64. Nothing is saved, skipped or fused, and masked entries
are selected away first, so no trick of the fast versions can hide here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_logprob(hidden, weight, targets, *, temperature=1.0, softcap=None, mask=None, return_entropy=False):
    """hidden [N,D], weight [V,D], targets [N] -> logprob [N] (and entropy [N]); materialises [N,V]."""
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    logits = hidden[keep] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = F.log_softmax(logits / temperature, dim=-1)
    logprob = distribution.gather(1, targets[keep].long()[:, None]).squeeze(1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    outputs = [torch.zeros_like(hidden[:, 0]).masked_scatter(keep, output) for output in (logprob, entropy)]
    return tuple(outputs) if return_entropy else outputs[0]


def masked_kl(logprobs, ref_logprobs, kind="k3", mask=None):
    """[N], [N] -> [N]; no limits."""
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    difference = (logprobs - ref_logprobs.detach())[keep]
    if kind == "k1":
        estimate = difference
    elif kind == "k2":
        estimate = difference**2 / 2
    else:
        estimate = torch.exp(-difference) + difference - 1
    return torch.zeros_like(logprobs).masked_scatter(keep, estimate)


def gae(rewards, values, cu_seqlens, *, gamma=1.0, lam=1.0, mask=None):
    """rewards, values [N], cu_seqlens [S+1] -> advantages, returns [N]; a Python loop over compacted sequences."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        owners: list[int] = []
        earned: list[float] = []
        for t in range(begin, end):
            if mask is None or bool(mask[t]):
                owners.append(t)
                earned.append(float(rewards[t]))
            elif owners:
                earned[-1] += float(rewards[t])
        next_value, advantage = 0.0, 0.0
        for t, reward in zip(reversed(owners), reversed(earned), strict=True):
            value = float(values[t])
            advantage = reward + gamma * next_value - value + gamma * lam * advantage
            advantages[t], returns[t], next_value = advantage, advantage + value, value
    return advantages, returns


def group_advantages(rewards, groups, *, normalize_std=True, eps=1e-6):
    """rewards, groups [N] -> advantages [N], keep [N] bool; a Python loop over groups."""
    advantages, keep = torch.zeros_like(rewards), torch.zeros(rewards.shape, dtype=torch.bool)
    for group in groups.unique():
        members = groups == group
        sample = rewards[members]
        if len(set(sample.tolist())) > 1:
            scale = sample.std() + eps if normalize_std else 1.0
            advantages[members], keep[members] = (sample - sample.mean()) / scale, True
    return advantages, keep


def masked_whiten(values, mask=None, *, eps=1e-8):
    """[N] -> [N]."""
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    sample = values[keep]
    if sample.numel() < 2:
        return torch.zeros_like(values)
    return torch.zeros_like(values).masked_scatter(keep, (sample - sample.mean()) / (sample.var() + eps).sqrt())
