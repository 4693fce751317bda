"""The plain form of every operation: a few lines each, in the precision of the inputs, differentiable by autograd.

Tests and benchmarks compare with these; give them fp64. Nothing is saved, skipped or fused, and masked entries
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


def linear_policy_loss(
    hidden, weight, targets, rollout_logprobs, advantages, *, ref_logprobs=None, old_logprobs=None, loss, denominator,
    on_policy=False, token_weights=None, token_rows=None, cu_seqlens=None, temperature=1.0, softcap=None, mask=None,
):  # fmt: skip
    """Shapes as in the operation -> loss 0-d, metrics; the objective as in the papers, its gradient by autograd."""
    if token_rows is not None:
        hidden, targets = hidden[token_rows], targets[token_rows]
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    head = {"temperature": temperature, "softcap": softcap, "return_entropy": True}
    logprob, entropy = linear_logprob(hidden[keep], weight, targets[keep], **head)
    rollout, advantage = rollout_logprobs[keep], advantages[keep]
    current, cap = logprob.detach(), loss.importance_cap or float("inf")
    token_weight = torch.ones_like(current) if token_weights is None else token_weights[keep]
    anchor = current if old_logprobs is None else old_logprobs[keep]
    rollout = torch.where(rollout.isnan(), anchor, rollout)
    to_sampler = old_logprobs is None and not on_policy and loss.kind != "reinforce"
    log_ratio = logprob - (rollout if to_sampler else anchor)
    if loss.kind == "gspo":
        sequence = torch.arange(len(cu_seqlens) - 1).to(keep.device).repeat_interleave(cu_seqlens.diff().long())[keep]
        means = [log_ratio[sequence == s].detach().mean() for s in sequence.tolist()]
        log_ratio = torch.stack([*means, current.new_zeros(())])[:-1] + logprob - current
    ratio, importance = torch.exp(log_ratio), torch.ones_like(current)
    truncated = torch.zeros_like(keep[keep])
    if to_sampler:
        ratio, truncated = ratio.clamp(max=cap), ratio > cap
    elif loss.importance_cap:
        importance, truncated = torch.exp(anchor - rollout).clamp(max=cap), torch.exp(anchor - rollout) > cap
    unclipped, clipped = advantage * ratio, advantage * ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    if loss.kind == "reinforce":
        objective, was_clipped = advantage * logprob, torch.zeros_like(truncated)
    elif loss.kind == "cispo":
        bound = 1 + loss.clip_high
        objective, was_clipped = ratio.detach().clamp(max=bound) * advantage * logprob, ratio > bound
    else:
        objective, was_clipped = torch.minimum(unclipped, clipped), clipped < unclipped
        if loss.dual_clip:
            bound = torch.where(advantage < 0, loss.dual_clip * advantage, -torch.inf)
            was_clipped = was_clipped | (objective < bound)
            objective = torch.maximum(objective, bound)
    policy = -(token_weight * importance * objective).sum()
    kl = torch.zeros_like(logprob) if ref_logprobs is None else masked_kl(logprob, ref_logprobs[keep], loss.kl_kind)
    total = policy + loss.kl_coefficient * (token_weight * kl).sum()
    total = total - loss.entropy_coefficient * (token_weight * entropy).sum()
    drift = torch.exp(current - rollout)
    metrics = {
        "policy_loss": policy.detach(),
        "clip_fraction": was_clipped.sum(),
        "truncated_fraction": truncated.sum(),
        "logprob_difference": (current - rollout).abs().sum(),
        "ratio": drift.sum(),
        "ratio_squared": (drift**2).sum(),
        "importance_weight": importance.sum(),
        "rollout_policy_kl": masked_kl(rollout, current, "k3").sum(),
        "entropy": entropy.detach().sum(),
        "logprob_difference_max": max((current - rollout).abs().tolist(), default=0.0),
        "ratio_max": max(drift.tolist(), default=0.0),
        "ratio_min": min(drift.tolist(), default=float("inf")),
    }
    if ref_logprobs is not None:
        metrics["kl_ref"] = kl.detach().sum()
    return total / denominator, {name: float(value) for name, value in metrics.items()}


def masked_kl(logprobs, ref_logprobs, kind="k3", mask=None):
    """[N], [N] -> [N], without limits."""
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    difference = (logprobs - ref_logprobs.detach())[keep]
    if kind == "k1":
        estimate = difference
    elif kind == "k2":
        estimate = difference**2 / 2
    else:
        estimate = torch.exp(-difference) + difference - 1
    return estimate.new_zeros(logprobs.shape).masked_scatter(keep, estimate)


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


def topk_inner_product(queries, corpus, k, *, scales=None):
    """queries [Q,D], corpus [M,D], scales [M] -> scores, ids [Q,k]; all scores in fp64, rounded to fp32, sorted."""
    scores = queries.double() @ corpus.double().T
    if scales is not None:
        scores = scores * scales.double()
    ordered = scores.float().sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def cached_attention(query, keys, values, slots, positions, table=None):
    """query [T,H,d], keys, values [C,G,M,d], slots, positions [T] -> [T,H,d]; a Python loop over tokens.

    With table [C,W], keys and values are [P,G,M,d].
    """
    if table is not None:
        keys, values = (x[table.long()].transpose(1, 2).flatten(2, 3) for x in (keys, values))  # [C, G, W * M, d]
    outputs, group = [], query.shape[1] // keys.shape[1]
    for q, slot, position in zip(query, slots.tolist(), positions.tolist(), strict=True):
        k, v = (x[slot, :, : position + 1].repeat_interleave(group, dim=0) for x in (keys, values))  # [H, m, d]
        weights = torch.softmax((k @ q[:, :, None]).squeeze(2) * q.shape[1] ** -0.5, dim=-1)
        outputs.append((weights[:, :, None] * v).sum(1))
    return torch.stack(outputs) if outputs else torch.empty_like(query)


def rms_norm(x, weight, eps, residual=None):
    """x, residual [T,D], weight [D] -> the norm of the sum, and the sum."""
    total = x if residual is None else x + residual
    return total / (total.square().mean(1, keepdim=True) + eps).sqrt() * weight, total


def rotary_write(query, key, value, cos, sin, keys, values, slots, positions, query_norm=None, key_norm=None, eps=1e-6):
    """Shapes as in the operation -> rotated query, and copies of keys and values with the tokens written."""
    keys, values, half = keys.clone(), values.clone(), query.shape[2] // 2
    if query_norm is not None:
        query = rms_norm(query.flatten(0, 1), query_norm, eps)[0].view_as(query)
        key = rms_norm(key.flatten(0, 1), key_norm, eps)[0].view_as(key)

    def rotate(x):
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[..., :half]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        keys[slot, :, position], values[slot, :, position] = rotate(key)[t], value[t]
    return rotate(query), keys, values


def silu_mul(gate, up):
    """[T,I], [T,I] -> [T,I]."""
    return gate / (1 + (-gate).exp()) * up


def sample_tokens(logits, randoms, *, temperature=1.0, top_k=0, top_p=1.0):
    """logits [S,V], randoms [S] -> ids, logprobs [S]; a Python loop over rows, each sorted."""
    distribution = F.log_softmax(logits / (temperature or 1.0), dim=-1)
    ids = distribution.argmax(-1)
    for row, (p, random) in enumerate(zip(distribution.exp(), randoms, strict=True)):
        if temperature > 0:
            likeliest = p.sort(descending=True).values[: top_k or None]
            before = likeliest.cumsum(0) - likeliest
            least = likeliest[before < top_p * likeliest.sum()][-1]
            sums = torch.where(p >= least, p, 0.0).cumsum(0)
            ids[row] = (sums > random * sums[-1]).int().argmax()
    return ids, distribution.gather(1, ids[:, None]).squeeze(1)
