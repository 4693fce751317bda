"""What kernels.py measures: operations of `searchr1_kernels` and other ways to the same result, on the same problem.

A case has its problem, its providers, the least that the work costs (operations of matrix units, bytes moved once), and
the optional peers that are missing. Providers return what they computed; first they are checked to agree.

The head's providers get what a trainer has: all tokens, and a mask of those that the policy wrote. Ours selects rows;
the others are told to ignore the rest, as in trainers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from generation_cases import cached_case, norm_case, rotary_case, sampling_case, silu_case
from kernel_case import OURS, Case, Provider
from searchr1_kernels import (
    PolicyLoss,
    TopKIndex,
    gae,
    group_advantages,
    linear_logprob,
    linear_policy_loss,
    masked_kl,
    open_search,
    topk_inner_product,
)
from searchr1_kernels.gae import _scan_torch
from way_cases import gae_ways_case, head_ways_case

IGNORED = -100  # a target that a cross-entropy leaves out


def cases(device: torch.device, kernels: list[str]) -> Iterator[Case]:
    """Yield all problems of these kernels, each made only when it is needed. On a GPU one size is varied at a time
    around 16k tokens of a 3B model, on a CPU around what takes a second."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    if gpu:
        base = {"N": 16384, "H": 2048, "V": 151_936, "kept": 0.3}
        variations = {"kept": (1.0, 0.6, 0.4, 0.2), "H": (1536, 3584, 4096), "V": (128_256,), "N": (4096, 65_536)}
    else:
        base = {"N": 512, "H": 256, "V": 8192, "kept": 0.3}
        variations = {"kept": (1.0, 0.6, 0.4, 0.2), "H": (512,), "V": (6000,), "N": (2048,)}
    sweep = [base, *(base | {name: value} for name, values in variations.items() for value in values)]
    for shape in sweep:
        if "head" in kernels:
            yield head_case(device, dtype, **shape)
        if "score" in kernels:
            yield score_case(device, dtype, **shape)
    if "head_ways" in kernels:
        for kept in (0.3, 1.0):
            shape = base | {"kept": kept}
            hidden, weight, targets, rows = head_problem(device, dtype, **shape)
            bare = bare_products(hidden, weight, rows, backward=True)
            yield head_ways_case(hidden, weight, targets, rows, bare, shape)
    for sequences in (4096, 1100, 512, 64):
        if "gae" in kernels:
            yield gae_case(device, 1_000_000, sequences)
        if "gae_ways" in kernels:
            problem = gae_problem(1_000_000, sequences)
            rewards, values, mask, cu_seqlens = (tensor.to(device) for tensor in problem[:4])
            options = {"gamma": 0.99, "lam": 0.95, "mask": mask}
            yield gae_ways_case((rewards, values, cu_seqlens), options, {"tokens": len(mask), "sequences": sequences})
    if "group" in kernels:
        yield group_case(device, 4096, 512)
    if "kl" in kernels:
        yield kl_case(device, 1 << 20 if gpu else 1 << 16)
    if "cached" in kernels:
        yield cached_case(device, dtype, [1] * (256 if gpu else 8), 2048 if gpu else 256)
        yield cached_case(device, dtype, [2048 if gpu else 64], 0)
    if "generation" in kernels:
        for rows in (1, 256) if gpu else (8,):
            yield norm_case(device, dtype, rows)
            yield rotary_case(device, dtype, rows)
            yield silu_case(device, dtype, rows)
    if "sample" in kernels:
        for rows, vocabulary in ((1, 151_936), (64, 151_936), (256, 151_936)) if gpu else ((64, 500), (8, 151_936)):
            for top_k, top_p, spread in ((0, 1.0, 3.0), (0, 0.95, 3.0), (0, 0.95, 0.3), (20, 1.0, 3.0)):
                yield sampling_case(device, rows, vocabulary, top_k, top_p, spread)
    if "topk" in kernels:
        rows, size = (8_000_000, 768) if gpu else (200_000, 384)
        corpus = make_corpus(device, torch.float16 if gpu else torch.float32, rows, size)
        index = TopKIndex(corpus)
        for queries in (1, 32, 128, 256):
            yield topk_case(corpus, index, queries)


# ------------------------------------------------------------------------------------------------------------- head


def head_problem(device, dtype, N, H, V, kept):
    """hidden [N,H], weight [V,H], targets [N] (IGNORED where the policy wrote nothing), rows [n] of the others."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device, generator=generator) / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device, generator=generator)
    rows = torch.randperm(N, device=device, generator=generator)[: round(kept * N)].sort().values
    ignored = torch.full_like(targets, IGNORED)
    ignored[rows] = targets[rows]
    return hidden, weight, ignored, rows


def head_case(device, dtype, N, H, V, kept) -> Case:
    """Loss and both gradients."""
    hidden, weight, targets, rows = head_problem(device, dtype, N, H, V, kept)
    objective, zeros = PolicyLoss(kind="reinforce"), torch.zeros(len(rows), device=device)

    def step(loss_of: Callable[..., torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run():
            loss = loss_of(hidden, weight)
            return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

        return run

    def plain(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED, reduction="sum")

    def selected(hidden, weight):
        return F.cross_entropy((hidden[rows] @ weight.T).float(), targets[rows], reduction="sum")

    def folded(hidden, weight, recompute=False):
        loss, _ = linear_policy_loss(
            hidden[rows], weight, targets[rows], zeros, zeros + 1, loss=objective, denominator=1.0, recompute=recompute
        )
        return loss

    losses = {
        OURS: lambda h, w: -linear_logprob(h[rows], w, targets[rows]).sum(),
        "ours, loss folded in": folded,
        "ours, loss folded in, recomputed": functools.partial(folded, recompute=True),
        "torch": plain,
        "torch, selected rows": selected,
    }
    left_out: dict[str, str] = {}
    add_compiled(losses, "torch.compile", plain, left_out)
    add_peer(losses, "Liger", "liger_kernel", liger_loss, left_out, targets)
    add_peer(losses, "cut-cross-entropy", "cut_cross_entropy", cut_loss, left_out, targets)
    providers = {name: Provider(step(loss)) for name, loss in losses.items()}
    providers["bare products"] = Provider(bare_products(hidden, weight, rows, backward=True), None)
    shape = {"N": N, "H": H, "V": V, "kept": kept, "dtype": str(dtype).removeprefix("torch.")}
    return Case("head", shape, providers, flops=6.0 * len(rows) * H * V, left_out=left_out)


def score_case(device, dtype, N, H, V, kept) -> Case:
    """Log-probabilities without gradients, as for a reference model."""
    hidden, weight, targets, rows = (t.detach() for t in head_problem(device, dtype, N, H, V, kept))
    wanted = targets[rows]

    def plain():
        return torch.log_softmax((hidden[rows] @ weight.T).float(), -1).gather(1, wanted[:, None]).squeeze(1)

    runs = {OURS: lambda: linear_logprob(hidden[rows], weight, wanted), "torch, selected rows": plain}
    left_out: dict[str, str] = {}
    add_compiled(runs, "torch.compile, selected rows", plain, left_out)
    providers = {name: Provider(run, lambda output: (output,)) for name, run in runs.items()}
    providers["bare products"] = Provider(bare_products(hidden, weight, rows, backward=False), None)
    shape = {"N": N, "H": H, "V": V, "kept": kept, "dtype": str(dtype).removeprefix("torch.")}
    return Case("score", shape, providers, flops=2.0 * len(rows) * H * V, left_out=left_out)


def bare_products(hidden, weight, rows, backward: bool) -> Callable[[], None]:
    """Only the matrix products, of the selected rows, in chunks that fit: no head can be faster."""
    hidden, weight = hidden.detach()[rows], weight.detach()
    size = min(4096, max(1, len(rows)))
    logits = torch.empty(size, weight.shape[0], device=hidden.device, dtype=hidden.dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden[:size]), torch.empty_like(weight)

    def run() -> None:
        for part in hidden.split(size):
            torch.mm(part, weight.T, out=logits[: len(part)])
            if backward:
                torch.mm(logits[: len(part)], weight, out=grad_hidden[: len(part)])
                torch.mm(logits[: len(part)].T, part, out=grad_weight)

    return run


def add_compiled(into: dict[str, Callable], name: str, function: Callable, left_out: dict[str, str]) -> None:
    """Add a compiled function. torch.compile needs a C++ compiler on a CPU; on a GPU it brings its own."""
    if torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")):
        into[name] = torch.compile(function)
    else:
        left_out[name] = "no C++ compiler"


def add_peer(into, name, package, make, left_out, targets) -> None:
    """Add an optional package's loss of (hidden, weight) for targets [N]."""
    if targets.device.type != "cuda":
        left_out[name] = "needs a GPU"
    elif importlib.util.find_spec(package) is None:
        left_out[name] = f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}"
    else:
        into[name] = make(targets)


def liger_loss(targets: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    return lambda hidden, weight: loss(weight, hidden, targets)


def cut_loss(targets: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum")


# ------------------------------------------------------------------------------------------------------- advantages


def gae_problem(tokens: int, sequences: int) -> tuple[torch.Tensor, ...]:
    """rewards, values, mask [N] of ragged sequences, 2 of 5 tokens the policy's; cu_seqlens [S+1]; lengths [S]."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * tokens // sequences, (sequences,), generator=generator)
    mask = torch.rand(int(lengths.sum()), generator=generator) < 0.4
    rewards, values = torch.randn(2, len(mask), generator=generator)
    rewards = rewards * mask  # the loop ignores rewards at masked tokens
    return rewards, values, mask, F.pad(lengths.cumsum(0), (1, 0)).int(), lengths


def gae_case(device, tokens: int, sequences: int) -> Case:
    """Make a case of `gae_problem`. The loop gets it padded, as in a trainer that uses it."""
    rewards, values, mask, cu_seqlens, lengths = gae_problem(tokens, sequences)
    inside = torch.arange(int(lengths.max())) < lengths[:, None]  # [S, T]
    total = len(mask)
    padded = [torch.zeros(inside.shape).masked_scatter(inside, x.float()).to(device) for x in (rewards, values, mask)]
    rewards, values, mask, cu_seqlens, inside = (x.to(device) for x in (rewards, values, mask, cu_seqlens, inside))
    options = {"gamma": 0.99, "lam": 0.95, "mask": mask}
    providers = {
        OURS: Provider(lambda: gae(rewards, values, cu_seqlens, **options)),
        "torch, by doubling": Provider(
            lambda: _scan_torch(rewards, values, cu_seqlens, 0.99, 0.95, mask, torch.float32)
        ),
        "reversed Python loop": Provider(
            functools.partial(reversed_loop, *padded, 0.99, 0.95),
            lambda output: tuple(x[inside] * mask for x in output),
        ),
    }
    shape = {"tokens": total, "sequences": sequences, "longest": int(lengths.max())}
    return Case("gae", shape, providers, bytes=17.0 * total)


def reversed_loop(rewards, values, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[S,T] each; one Python step per token position over all sequences, skipping masked tokens, as in verl."""
    next_value = advantage = torch.zeros_like(rewards[:, 0])
    found = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        candidate = delta + gamma * lam * advantage
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        advantage = candidate * mask[:, t] + (1 - mask[:, t]) * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, advantages + values


def group_case(device, samples: int, groups: int) -> Case:
    """GRPO's advantages, in the order in which samples arrive."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(samples, generator=generator).to(device)
    member = torch.arange(samples)[torch.randperm(samples, generator=generator)].remainder(groups).to(device)
    providers = {
        OURS: Provider(lambda: group_advantages(rewards, member)[:1]),
        "Python loop over groups": Provider(lambda: (group_loop(rewards, member),)),
    }
    return Case("group", {"samples": samples, "groups": groups}, providers, bytes=20.0 * samples)


def group_loop(rewards: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """[N], [N] -> [N]; lists of scores by group, then each sample's own mean and deviation, as in verl."""
    names = member.tolist()
    scores: dict[int, list[torch.Tensor]] = {}
    for name, reward in zip(names, rewards, strict=True):
        scores.setdefault(name, []).append(reward)
    stacked = {name: torch.stack(found) for name, found in scores.items()}
    moments = {name: (found.mean(), found.std()) for name, found in stacked.items()}
    return torch.stack([(r - moments[n][0]) / (moments[n][1] + 1e-6) for n, r in zip(names, rewards, strict=True)])


def kl_case(device, tokens: int) -> Case:
    """k3 with its gradient."""
    generator = torch.Generator(device).manual_seed(0)
    logprobs, reference = -torch.rand(2, tokens, device=device, generator=generator)
    logprobs.requires_grad_()

    def plain(logprobs):
        difference = reference - logprobs
        return difference.exp() - difference - 1

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run():
            estimate = function(logprobs)
            return estimate.detach(), *torch.autograd.grad(estimate.sum(), logprobs)

        return run

    functions = {OURS: lambda x: masked_kl(x, reference), "torch": plain}
    left_out: dict[str, str] = {}
    add_compiled(functions, "ours, torch.compile", functions[OURS], left_out)
    providers = {name: Provider(step(function)) for name, function in functions.items()}
    return Case("kl", {"tokens": tokens}, providers, bytes=16.0 * tokens, left_out=left_out)


# ----------------------------------------------------------------------------------------------------------- search


def make_corpus(device, dtype, rows: int, size: int) -> torch.Tensor:
    """Make [M,D] unit vectors of no preferred direction, the hardest kind to search by bounds."""
    generator = torch.Generator(device).manual_seed(0)
    corpus = torch.empty(rows, size, device=device, dtype=dtype)
    for part in corpus.split(1 << 20):
        part.copy_(F.normalize(torch.randn(part.shape, device=device, generator=generator), dim=1))
    return corpus


def topk_case(corpus: torch.Tensor, index: TopKIndex, num_queries: int, k: int = 10) -> Case:
    """Exact search. faiss is measured as it comes, which from 1.15 on means no matrix products for batches below
    128,000 numbers, and with matrix products always, which on one thread is faster."""
    device = corpus.device
    generator = torch.Generator(device).manual_seed(1)
    queries = F.normalize(torch.randn(num_queries, corpus.shape[1], device=device, generator=generator), dim=1)
    providers = {
        OURS: Provider(lambda: topk_inner_product(queries, index, k)),
        "ours, not prepared": Provider(lambda: topk_inner_product(queries, corpus, k)),
        "torch: product, topk": Provider(lambda: torch.topk((queries.to(corpus.dtype) @ corpus.T).float(), k)),
    }
    left_out = {}
    if device.type == "cuda":
        rows = TopKIndex(corpus, coarse="float")
        for prepared in (index, rows):  # from here on, both are searched in their fastest way
            open_search(prepared, num_queries, k).tune(num_queries)
        providers["ours, without codes"] = Provider(lambda: topk_inner_product(queries, rows, k))
        left_out["faiss"] = "its CPU package says nothing about a GPU"
    elif importlib.util.find_spec("faiss") is None:
        left_out["faiss"] = "faiss is not installed: pip install --no-deps faiss-cpu"
    else:
        default, flat = faiss_index(corpus)
        for name, threshold in (("faiss", default), ("faiss, products forced", 20)):
            providers[name] = Provider(functools.partial(faiss_search, flat, queries.numpy(), k, threshold))
    for provider in providers.values():
        provider.answer = lambda output: (torch.as_tensor(output[0]),)  # ids may differ where scores tie
    rows, size = corpus.shape
    shape = {"rows": rows, "size": size, "queries": num_queries, "k": k, "dtype": str(corpus.dtype)[6:]}
    return Case("topk", shape, providers, 2.0 * rows * size * num_queries, float(corpus.nbytes), left_out)


@functools.cache
def faiss_index(corpus: torch.Tensor) -> tuple[int, Any]:
    """-> the number of queries from which this faiss multiplies matrices, and a flat index of the corpus."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(corpus.shape[1])
    flat.add(corpus.numpy())
    return faiss.cvar.distance_compute_blas_threshold, flat


def faiss_search(flat: Any, queries: Any, k: int, threshold: int) -> Any:
    """-> scores and ids."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = threshold
    return flat.search(queries, k)
