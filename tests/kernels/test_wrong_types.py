"""An argument of a wrong type, shape or device raises a ValueError that begins with an argument's name."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import searchr1_kernels as kernels
import torch

ROWS = torch.linspace(-1.0, 1.0, 4)
MATRIX = torch.linspace(-1.0, 1.0, 32).view(4, 8)
IDS = torch.tensor([0, 0, 1, 1])
MASK = torch.ones(4, dtype=torch.bool)
HEADS = torch.linspace(-1.0, 1.0, 16).view(4, 1, 4)
CACHE = torch.linspace(-1.0, 1.0, 64).view(2, 1, 8, 4)
CALLS = {
    "linear_logprob": dict(hidden=MATRIX, weight=MATRIX, targets=IDS, temperature=1.0, softcap=5.0, mask=MASK),
    "linear_policy_loss": dict(
        hidden=MATRIX, weight=MATRIX, targets=IDS, rollout_logprobs=ROWS, advantages=ROWS, ref_logprobs=ROWS,
        old_logprobs=ROWS, token_weights=ROWS, mask=MASK, denominator=4, temperature=1.0, softcap=5.0,
    ),
    "masked_kl": dict(logprobs=ROWS, ref_logprobs=ROWS, kind="k3", mask=MASK),
    "gae": dict(rewards=ROWS, values=ROWS, cu_seqlens=torch.tensor([0, 4]), gamma=1.0, lam=1.0, mask=MASK),
    "group_advantages": dict(rewards=ROWS, groups=IDS, eps=1e-6),
    "masked_moments": dict(values=ROWS, mask=MASK),
    "masked_whiten": dict(values=ROWS, mask=MASK, moments=torch.ones(3), eps=1e-6),
    "rms_norm": dict(x=MATRIX, weight=MATRIX[0], eps=1e-6, residual=MATRIX),
    "silu_mul": dict(gate=MATRIX, up=MATRIX),
    "rotary_write": dict(
        query=HEADS, key=HEADS, value=HEADS, cos=HEADS, sin=HEADS, keys=CACHE.clone(), values=CACHE.clone(),
        blocks=IDS, places=torch.arange(4), query_norm=ROWS, key_norm=ROWS, eps=1e-6,
    ),
    "cached_attention": dict(
        query=HEADS, keys=CACHE, values=CACHE, slots=IDS, positions=torch.arange(4),
        table=torch.arange(2, dtype=torch.int32)[:, None], tiles=torch.tensor([[0, 2], [2, 2]], dtype=torch.int32),
        num_alone=0,
    ),
    "sample_tokens": dict(logits=MATRIX, randoms=ROWS.abs() / 2, temperature=1.0, top_k=3, top_p=0.9),
    "topk_inner_product": dict(queries=MATRIX, corpus=MATRIX, k=2),
    "open_search": dict(index=kernels.TopKIndex(MATRIX), max_queries=2, max_k=2),
    "TopKIndex": dict(corpus=MATRIX),
}  # fmt: skip
WHOLE = {"top_k", "k", "max_queries", "max_k", "num_alone"}
NUMBERS = WHOLE | {"temperature", "softcap", "denominator", "gamma", "lam", "eps", "top_p"}
# Each of these may be None, and a denominator may be a tensor.
OPTIONAL = {"softcap", "mask", "ref_logprobs", "old_logprobs", "token_weights", "moments", "residual", "table", "tiles"}
CASES = [(name, argument) for name, arguments in CALLS.items() for argument in arguments]


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_are_numbers(name):
    given = CALLS[name]
    plain = getattr(kernels, name)(**given)
    kinds = {float: np.float64, int: np.int32}
    same = {key: kinds[type(value)](value) if key in NUMBERS else value for key, value in given.items()}
    if name not in ("open_search", "TopKIndex"):
        again = getattr(kernels, name)(**same)
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_wrong_types_are_named(name, argument):
    call = partial(getattr(kernels, name), **CALLS[name])
    wrong = ["text", [1.0, 2.0], np.zeros(4, np.float32), object()]
    if argument in NUMBERS:
        wrong += [2.5] if argument in WHOLE else []
        wrong += [float("nan"), torch.zeros(3), torch.zeros(4, 8, dtype=torch.int8)]
    else:
        wrong += [3, -1.5, True]
    if argument not in OPTIONAL:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{argument}: expected"):
            call(**{argument: value})


def changed(tensor):
    """The same tensor on another device, in other shapes and in other types, none of which fits."""
    yield tensor.to("meta")
    yield tensor[None]
    yield tensor.flatten()[0]
    yield tensor.to(torch.complex64)
    yield tensor.to(torch.uint8)
    yield tensor.long() if tensor.is_floating_point() else tensor.double()


TENSORS = [(name, argument) for name, argument in CASES if isinstance(CALLS[name][argument], torch.Tensor)]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_wrong_tensors_are_named(name, argument):
    """Its own name, or that of an argument that does not fit it: the first argument sets the device for all."""
    given = CALLS[name]
    for value in changed(given[argument]):
        names = f"{argument}|{'|'.join(given)}" if value.device.type == "meta" else argument
        with pytest.raises(ValueError, match=rf"^({names}): expected"):
            getattr(kernels, name)(**(given | {argument: value}))


# For one row more: where a size is free, the first argument with another size is named.
FREE = {("linear_logprob", "weight"), ("linear_policy_loss", "weight"), ("topk_inner_product", "queries"),
        ("topk_inner_product", "corpus"), ("TopKIndex", "corpus"), ("cached_attention", "table"),
        ("cached_attention", "tiles")}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [case for case in TENSORS if case not in FREE])
def test_a_row_too_many_is_named(name, argument):
    given = CALLS[name]
    longer = torch.cat([given[argument], given[argument][:1]])
    with pytest.raises(ValueError, match=rf"^({'|'.join(given)}): expected (shape|offsets)"):
        getattr(kernels, name)(**(given | {argument: longer}))
