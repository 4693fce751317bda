"""What a decoder does between its matrix products during generation: one launch each on a GPU, constants to autograd.

A step of one token per sequence does so little in each operation that the number of launches decides how long it takes:
written in torch's operators, these three are about 30 launches a layer. Values are rounded where the operators would
round, so results differ from theirs only in the order of sums and in fused multiply-adds.

CUDA: `_generation_triton`. CPU, fp32 and bf16: `_generation_numba`. Elsewhere: torch's operators. On a CPU a token has
the same bits alone and in any batch, whatever its layout in memory.

Shape legend: T tokens, D hidden size, I MLP size, H query heads, G key/value heads, d head size, P blocks of M places.
"""

from __future__ import annotations

import torch

from searchr1_kernels import checks
from searchr1_kernels._installed import has_triton
from searchr1_kernels.registration import register

MAX_NORM_SIZE = 16384  # components of a row, which one program holds
MAX_HEAD_DIM = 512


def rms_norm(
    x: torch.Tensor,  # [T, D]
    weight: torch.Tensor,  # [D]
    eps: float,
    residual: torch.Tensor | None = None,  # [T, D]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the root-mean-square norm of `x + residual`, and that sum, both [T, D] in the type of `x`.

    Without `residual`: the norm of `x`, and `x` itself. The norm is arXiv 1910.07467, eq. 4. The sum is rounded to the
    type before the norm, whose statistics are fp32. Raises ValueError where a shape, type or device differs, or D is
    over 16,384.
    """
    checks.check_shape("x", x, ("T", "D"))
    checks.check_floating("x", x)
    checks.check_shape("weight", weight, (x.shape[1],))
    checks.check_floating("weight", weight)
    checks.check_device("weight", weight, "x", x)
    if x.shape[1] > MAX_NORM_SIZE:
        raise ValueError(f"x: expected rows of at most {MAX_NORM_SIZE} components, got {x.shape[1]}")
    checks.check_number("eps", eps, 0.0)
    if residual is None:
        return _NORM(x.detach(), weight.detach(), eps), x
    _check_like("residual", residual, "x", x)
    return _ADD_NORM(x.detach(), residual.detach(), weight.detach(), eps)


def rotary_write(
    query: torch.Tensor,  # [T, H, d]
    key: torch.Tensor,  # [T, G, d]
    value: torch.Tensor,  # [T, G, d]
    cos: torch.Tensor,  # [T, 1, d] fp32
    sin: torch.Tensor,  # [T, 1, d] fp32
    keys: torch.Tensor,  # [P, G, M, d], written
    values: torch.Tensor,  # [P, G, M, d], written
    blocks: torch.Tensor,  # [T] int64
    places: torch.Tensor,  # [T] int64
    *,
    query_norm: torch.Tensor | None = None,  # [d]
    key_norm: torch.Tensor | None = None,  # [d]
    eps: float = 1e-6,
) -> torch.Tensor:
    """-> `query` with its pairs (i, i + d/2) rotated by the angles (arXiv 2104.09864, eq. 34), [T, H, d].

    The rotated keys, and the values, are written to the cache at `places` of `blocks`, which are read on the device
    only. With `query_norm` and `key_norm` (both or none), the heads first go through an RMS norm, rounded to their
    type. Raises ValueError where a shape, type or device is not as above, or d is odd or over 512; on a GPU also where
    the components of the cache do not lie together; on a CPU also for blocks and places that do not exist.
    """
    checks.check_shape("query", query, ("T", "H", "d"))
    checks.check_floating("query", query)
    num_tokens, _, head_dim = query.shape
    checks.check_shape("key", key, (num_tokens, "G", head_dim))
    checks.check_shape("value", value, tuple(key.shape))
    checks.check_shape("keys", keys, ("C", key.shape[1], "M", head_dim))
    checks.check_shape("values", values, tuple(keys.shape))
    for name, tensor in (("key", key), ("value", value), ("keys", keys), ("values", values)):
        checks.check_dtype(name, tensor, query.dtype)
    for name, tensor in (("cos", cos), ("sin", sin)):
        checks.check_shape(name, tensor, (num_tokens, 1, head_dim))
        checks.check_dtype(name, tensor, torch.promote_types(query.dtype, torch.float32))
    for name, tensor in (("blocks", blocks), ("places", places)):
        checks.check_shape(name, tensor, (num_tokens,))
        checks.check_dtype(name, tensor, torch.int64)
    if (query_norm is None) != (key_norm is None):
        missing = "query_norm" if query_norm is None else "key_norm"
        raise ValueError(f"{missing}: expected both or none of the norms, got None")
    norms = () if query_norm is None else (("query_norm", query_norm), ("key_norm", key_norm))
    for name, tensor in norms:
        checks.check_shape(name, tensor, (head_dim,))
        checks.check_floating(name, tensor)
    named = {"key": key, "value": value, "cos": cos, "sin": sin, "keys": keys, "values": values, "blocks": blocks}
    for name, tensor in (*named.items(), ("places", places), *norms):
        checks.check_device(name, tensor, "query", query)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"query: expected heads of an even number of components, at most 512, got {head_dim}")
    checks.check_number("eps", eps, 0.0)
    floats = (tensor.detach() for tensor in (query, key, value, cos, sin, keys, values))
    detached = (None, None) if query_norm is None else (query_norm.detach(), key_norm.detach())
    return _ROTARY_WRITE(*floats, blocks, places, *detached, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [T, I] -> `silu(gate) * up`, [T, I] in the type of `gate`, to which the SiLU is rounded first.

    SwiGLU, arXiv 2002.05202, eq. 5. Raises ValueError where the two differ in shape, type or device.
    """
    checks.check_shape("gate", gate, ("T", "I"))
    checks.check_floating("gate", gate)
    _check_like("up", up, "gate", gate)
    return _SILU_MUL(gate.detach(), up.detach())


def _check_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    checks.check_shape(name, tensor, tuple(other.shape))
    checks.check_dtype(name, tensor, other.dtype)
    checks.check_device(name, tensor, other_name, other)


# ------------------------------------------------------------------------------------------------------- the operators
# Outputs are contiguous whatever the inputs are: compiled code relies on the strides that tracing saw.


def _rms_norm(x, weight, eps):
    if _on_gpu("x", x):
        return _triton().norm(x, None, weight, eps)[0]
    x, weight = _together(x, weight)
    if (loops := _loops()).takes(x, weight):
        return loops.norm(x, None, weight, eps)[0]
    return _norm_torch(x, weight, eps)


def _add_rms_norm(x, residual, weight, eps):
    if _on_gpu("x", x):
        return _triton().norm(x, residual, weight, eps)
    x, residual, weight = _together(x, residual, weight)
    if (loops := _loops()).takes(x, residual, weight):
        return loops.norm(x, residual, weight, eps)
    total = (x + residual).contiguous()
    return _norm_torch(total, weight, eps), total


def _rotary_write(query, key, value, cos, sin, keys, values, blocks, places, query_norm, key_norm, eps):
    if _on_gpu("query", query):
        for name, cache in (("keys", keys), ("values", values)):
            if cache.stride(3) != 1:  # written in place, so a copy would not help
                raise ValueError(f"{name}: expected components that lie together, got strides {cache.stride()}")
        tensors = (query, key, value, cos, sin, keys, values, blocks, places)
        return _triton().rotary_write(*tensors, query_norm, key_norm, eps)
    checks.check_indices("blocks", blocks, keys.shape[0])  # or loops would write outside the cache
    checks.check_indices("places", places, keys.shape[2])
    loops, memory = _loops(), (keys, values)
    heads = query, key, value = [x if loops.heads_are_rows(x) else x.contiguous() for x in _together(query, key, value)]
    in_order = keys.is_contiguous() and values.is_contiguous()
    if in_order and loops.takes(*heads, *memory, query_norm, key_norm):
        return loops.rotary_write(*heads, cos, sin, *memory, blocks, places, query_norm, key_norm, eps)
    if query_norm is not None:
        query, key = _norm_torch(query, query_norm, eps), _norm_torch(key, key_norm, eps)
    keys[blocks, :, places] = _rotate_torch(key, cos, sin)
    values[blocks, :, places] = value
    return _rotate_torch(query, cos, sin)


def _silu_mul(gate, up):
    if _on_gpu("gate", gate):
        return _triton().silu_mul(gate, up)
    gate, up = _together(gate, up)
    if (loops := _loops()).takes(gate, up):
        return loops.silu_mul(gate, up)
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    # Not torch's SiLU: it uses another exponential for the last few numbers of a piece, so a row alone has other bits.
    return ((x / (1 + torch.exp(-x))).to(gate.dtype) * up).contiguous()


def _on_gpu(name: str, x: torch.Tensor) -> bool:
    if x.device.type != "cuda" or not has_triton():
        return False
    if x.dtype == torch.float64:
        raise ValueError(f"{name}: expected torch.float32, torch.float16 or torch.bfloat16 on a GPU, got fp64")
    return True


def _together(*tensors):
    """-> the tensors with the components of each row side by side.

    The layout must not choose between the loops and torch, whose results differ in the last bit.
    """
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _loops():
    from searchr1_kernels import _generation_numba

    return _generation_numba


def _triton():
    from searchr1_kernels import _generation_triton

    return _generation_triton


def _norm_torch(x, weight, eps):
    """RMS norm over the last dimension of any tensor."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.rms_norm(x.to(compute), weight.shape, weight.to(compute), eps).to(x.dtype)


def _rotate_torch(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype).contiguous()


_NORM = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, lambda x, weight, eps: x.new_empty(x.shape)
)
_ADD_NORM = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_ROTARY_WRITE = register(
    "rotary_write(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor blocks, Tensor places, Tensor? query_norm, Tensor? key_norm, float eps) -> Tensor",
    _rotary_write,
    lambda query, *others: query.new_empty(query.shape),
)
_SILU_MUL = register(
    "silu_mul(Tensor gate, Tensor up) -> Tensor", _silu_mul, lambda gate, up: gate.new_empty(gate.shape)
)
