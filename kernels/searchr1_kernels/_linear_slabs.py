"""The backward pass of `linear_logprob` on a GPU: slabs of the vocabulary outside, rows inside.

With a row's normalizer known, the gradient of any of its logits can be formed without the others. So each slab of
columns is finished, over all rows, before the next one begins: its part of the weight's gradient is one matrix product,
summed in fp32 by the library and rounded once into the type of the weight. Chunks of rows would each add to all of that
gradient in fp32. This would take twice its memory and, at 16k rows of D 2,048, four times the reading and writing that
it takes here to add to the gradient of `hidden` slab by slab.

Most of the memory that a call takes, in bytes; hidden and weight have b bytes a number (2 for bf16), as have the
gradients of the logits:

    V D b           gradient of the weight, the result
    N D (4 + b)     gradient of hidden: its sum in fp32, and the result
    (4 + b) R C     the workspace: logits in fp32 and their gradient, R rows by C columns, at most `_SLAB_BYTES`; where
                    the product forms the gradient itself (`_linear_gradient_triton`), b R C
    4 C D           where there are more rows than R: the slab's sum in fp32

For V 151,936, D 2,048, N 16,384 in bf16: 622 + 201 + 403 = 1,226 MB, of which only 537 are not results. With the
gradient formed in the product: 622 + 201 + 537 = 1,360 MB, with a quarter as many slabs.

Shape legend: N rows, D hidden size, V vocabulary, R rows at once, C columns of a slab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from searchr1_kernels._linear_chunks import chunk_size, longest, memory_budget, ranges, runs_products, whole_tiles
from searchr1_kernels._linear_rows_triton import differentiate, launch_options
from searchr1_kernels._linear_sums import compute_dtype, multiply, multiply_add, operand

# The largest workspace; on a GPU also at most a quarter of the free memory.
_SLAB_BYTES = 512 << 20
# The most rows whose logits exist at once, and the fewest columns: matrix products are efficient where both are large.
_MAX_ROWS = 16_384
_MIN_COLUMNS = 1024


def slab_gradients(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
    grad_logprobs: torch.Tensor,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    entropy: torch.Tensor | None,  # [N]: where grad_entropy is given
    normalizers: torch.Tensor,  # [N, 2] of `score_rows`
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """-> grad_hidden [N,D] fp32 and grad_weight [V,D] in the type of the weight; None where not wanted."""
    compute = compute_dtype(hidden)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=compute) if want_hidden else None
    products = runs_products(hidden, weight, softcap)
    chunks, columns = tiles(hidden, weight, products)
    grad_weight = None
    if want_weight:
        grad_weight = weight.new_empty(weight.shape) if chunks else weight.new_zeros(weight.shape)
    several = want_weight and len(chunks) > 1
    sums = weight.new_empty(columns, weight.shape[1], dtype=compute) if several else None
    form = (_own_product if products else _library_product)(hidden, weight, longest(chunks), columns)
    for slab in ranges(weight.shape[0], columns):
        part = operand(weight[slab])  # [C, D]
        for chunk in chunks:
            rows = operand(hidden[chunk])  # [R, D]
            vectors = (targets, grad_logprobs, grad_entropy, entropy, normalizers)
            vectors = (None if x is None else x[chunk] for x in vectors)
            gradient = form(rows, part, slab.start, *vectors, temperature, softcap)
            if want_hidden:
                multiply_add(gradient, part, out=grad_hidden[chunk])
            if want_weight:
                combine = multiply if chunk.start == 0 else multiply_add
                combine(gradient.t(), rows, out=sums[: len(part)] if several else grad_weight[slab])
        if several:
            grad_weight[slab] = sums[: len(part)]
    return grad_hidden, grad_weight


def _library_product(hidden: torch.Tensor, weight: torch.Tensor, height: int, width: int) -> Callable:
    """-> function that fills a workspace [height, width] with gradients: a product, then a pass over its logits."""
    compute, operand_dtype = compute_dtype(hidden), operand(weight[:0]).dtype
    logits = hidden.new_empty(height * width, dtype=compute)
    gradients = logits if operand_dtype == compute else torch.empty_like(logits, dtype=operand_dtype)

    def form(rows, part, first, targets, g, e, entropy, normalizers, temperature, softcap):
        shape, size = (len(rows), len(part)), len(rows) * len(part)
        z, gradient = logits[:size].view(shape), gradients[:size].view(shape)
        multiply(rows, part.t(), out=z)
        options = launch_options(temperature, softcap, width)
        differentiate(z, gradient, first, targets, g, e, entropy, normalizers, options)
        return gradient

    return form


def _own_product(hidden: torch.Tensor, weight: torch.Tensor, height: int, width: int) -> Callable:
    """-> function like that of `_library_product`, with product and pass in one kernel."""
    from searchr1_kernels._linear_gradient_triton import aligned_rows, aligned_width, differentiate_slab

    gradients = hidden.new_empty(height * aligned_width(width), dtype=weight.dtype)

    def form(rows, part, first, targets, g, e, entropy, normalizers, temperature, softcap):
        gradient = aligned_rows(gradients, len(rows), len(part))
        differentiate_slab(rows, part, gradient, first, targets, g, e, entropy, normalizers, temperature)
        return gradient

    return form


def tiles(hidden: torch.Tensor, weight: torch.Tensor, products: bool) -> tuple[list[slice], int]:
    """-> chunks of rows, and columns of a slab: all, or a power of two. `products`: where `runs_products` holds."""
    rows = whole_tiles(chunk_size(hidden.shape[0], _MAX_ROWS))
    operand_dtype, compute = operand(weight[:0]).dtype, compute_dtype(hidden)
    bytes_per_logit = operand_dtype.itemsize
    if not products:
        bytes_per_logit = compute.itemsize + (operand_dtype.itemsize if operand_dtype != compute else 0)
    fitting = memory_budget(hidden.device, _SLAB_BYTES) // (rows * bytes_per_logit)
    columns = max(_MIN_COLUMNS, 1 << fitting.bit_length() >> 1)
    return ranges(hidden.shape[0], rows), min(columns, weight.shape[0])
