"""The problems of generation: attention over a KV cache, what a decoder does between its products, and sampling.

They are like those of kernel_cases.py, which yields them, at the widths of a 3B model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_case import OURS, Case, Provider
from searchr1_kernels import attention_tiles, cached_attention, rms_norm, rotary_write, sample_tokens, silu_mul
from searchr1_kernels.sampling import _keep, sample_torch

from searchr1_fast.models.cached_attention import cached_attention_reference
from searchr1_fast.models.kv_cache import block_size
from searchr1_fast.models.rope import apply_rotary


def cached_case(device, dtype, lengths: list[int], cached: int, H: int = 16, G: int = 2, d: int = 128) -> Case:
    """Attention of new tokens to sequences that have `cached` places each, at the width of a 3B model."""
    generator, places = torch.Generator(device).manual_seed(0), cached + max(lengths)
    query = torch.randn(sum(lengths), H, d, device=device, generator=generator).to(dtype)
    size = block_size(device)
    width = -(-places // size)
    blocks = [
        torch.randn(len(lengths) * width, G, size, d, device=device, generator=generator).to(dtype) for _ in range(2)
    ]
    table = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(1))
    table = table.view(len(lengths), width).int().to(device)
    # The same keys and values with every slot in one piece.
    keys, values = (x[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :places].contiguous() for x in blocks)
    slots = torch.cat([torch.full((n,), s) for s, n in enumerate(lengths)]).to(device)
    positions = torch.cat([torch.arange(cached, cached + n) for n in lengths]).to(device)
    found = attention_tiles(lengths, H // G)
    tiles, num_alone = (None, 0) if found is None else (torch.from_numpy(found[0]).to(device), found[1])

    def padded():
        """Attend for sequences of one length: all slots at once, as a padded batch."""
        k, v = (x[: len(lengths)].repeat_interleave(H // G, dim=1) for x in (keys, values))
        q = query.view(len(lengths), lengths[0], H, d).transpose(1, 2)
        visible = torch.ones(lengths[0], places, dtype=torch.bool, device=device).tril(places - lengths[0])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(0, 1)

    options = {"tiles": tiles, "num_alone": num_alone}
    plain = functools.partial(cached_attention_reference, query, *blocks, table, slots, positions)
    runs = {
        OURS: lambda: cached_attention(query, *blocks, slots, positions, table=table, **options),
        "ours, every slot in one piece": lambda: cached_attention(query, keys, values, slots, positions, **options),
        "torch, every token's slot gathered": plain,
        "SDPA, padded": padded,
    }
    providers = {name: Provider(run, lambda output: (output.float(),)) for name, run in runs.items()}
    seen = sum(cached * n + n * (n + 1) // 2 for n in lengths)  # pairs of a token and a place that it attends to
    shape = {"T": sum(lengths), "S": len(lengths), "cached": cached, "dtype": str(dtype).removeprefix("torch.")}
    moved = 2.0 * len(lengths) * places * G * d * keys.element_size()
    return Case("cached", shape, providers, flops=4.0 * seen * H * d, bytes=moved)


# ------------------------------------------------------------------------------------------------------- generation


def norm_case(device, dtype, rows: int, size: int = 2048) -> Case:
    """The residual sum and its norm."""
    x, residual, weight = random_rows(device, dtype, (rows, size), (rows, size), (size,))

    def plain():
        total = x + residual
        return F.rms_norm(total.float(), (size,), weight.float(), 1e-6).to(dtype), total

    runs = {OURS: lambda: rms_norm(x, weight, 1e-6, residual), "torch": plain}
    return generation_case("rms_norm", dtype, rows, runs, 4.0 * x.nbytes)


def rotary_case(device, dtype, rows: int, H: int = 16, G: int = 2, d: int = 128, places: int = 1024) -> Case:
    """Rotation of query and key, and writing one token per sequence to the cache."""
    query, key, value = random_rows(device, dtype, (rows, H, d), (rows, G, d), (rows, G, d))
    slots, positions = torch.arange(rows, device=device), torch.arange(rows, device=device) % places
    angles = positions[:, None, None].float() / torch.arange(1, d + 1, device=device)
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.zeros(rows, G, places, d, dtype=dtype, device=device) for _ in range(2)]

    def plain():
        rotated = [apply_rotary(x, cos, sin) for x in (query, key)]
        for cache, new in zip(caches, (rotated[1], value), strict=True):
            cache[slots, :, positions] = new
        return rotated[0]

    def ours():
        return rotary_write(query, key, value, cos, sin, *caches, slots, positions)

    runs = {OURS: lambda: (ours(),), "torch": lambda: (plain(),)}
    moved = 2.0 * (query.nbytes + key.nbytes + value.nbytes) + cos.nbytes + sin.nbytes
    return generation_case("rotary_write", dtype, rows, runs, moved)


def silu_case(device, dtype, rows: int, size: int = 11008) -> Case:
    """SwiGLU."""
    gate, up = random_rows(device, dtype, (rows, size), (rows, size))
    runs = {OURS: lambda: (silu_mul(gate, up),), "torch": lambda: (F.silu(gate) * up,)}
    return generation_case("silu_mul", dtype, rows, runs, 3.0 * gate.nbytes)


def generation_case(kernel: str, dtype, rows: int, runs: dict[str, Callable], moved: float) -> Case:
    """Make one of these three cases, at the widths of a 3B model."""
    providers = {name: Provider(run, lambda output: tuple(x.float() for x in output)) for name, run in runs.items()}
    return Case(kernel, {"T": rows, "dtype": str(dtype).removeprefix("torch.")}, providers, bytes=moved)


# --------------------------------------------------------------------------------------------------------- sampling


def sampling_case(device, rows: int, vocabulary: int, top_k: int, top_p: float, spread: float) -> Case:
    """Sample a token of every row at temperature 1. `spread` is the standard deviation of the logits: a smaller one is
    flatter, and leaves top-p more to search. `torch.multinomial` draws its own random numbers."""
    (logits,) = random_rows(device, torch.float32, (rows, vocabulary))
    logits *= spread
    generator = torch.Generator(device).manual_seed(1)
    randoms = torch.rand(rows, dtype=torch.float64, device=device, generator=generator)

    def multinomial():
        probabilities = torch.softmax(logits, dim=-1)
        kept = probabilities if top_k == 0 and top_p == 1 else _keep(probabilities, top_k, top_p)
        ids = torch.multinomial(kept, 1)
        return ids[:, 0], probabilities.gather(1, ids)[:, 0].log()

    providers = {
        OURS: Provider(lambda: sample_tokens(logits, randoms, top_k=top_k, top_p=top_p), logprobs_of),
        "torch": Provider(lambda: sample_torch(logits, randoms, 1.0, top_k, top_p), logprobs_of),
        "torch.multinomial": Provider(multinomial, None),
    }
    shape = {"S": rows, "V": vocabulary, "top_k": top_k, "top_p": top_p, "spread": spread}
    return Case("sample", shape, providers, bytes=float(logits.nbytes))


def logprobs_of(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor]:
    """Return the log-probabilities that `sample_tokens` gives: they differ where the tokens do."""
    return (output[1],)


def random_rows(device, dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Make a random tensor of each shape."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
