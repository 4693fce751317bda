"""Fixtures: live memory, what a sampler may draw, small chunks, and a quicker and stricter Triton interpreter."""

from __future__ import annotations

import dataclasses
import inspect
import os

import pytest
import torch
from live_bytes import LiveBytes
from searchr1_kernels import _linear_chunks


@pytest.fixture
def live_bytes():
    """-> a fresh `LiveBytes`, to use as a context manager."""
    return LiveBytes()


def check_row(logits, random, token, logprob, temperature, top_k, top_p):
    """Check that a row's token and log-probability are right up to rounding to fp32; logits [V] fp32.

    The kept set may differ by tokens worth 1e-6 of the total, and the uniform may miss the token's interval by as much.
    """
    scaled = logits.double() / (temperature or 1.0)
    table = torch.log_softmax(scaled, dim=0)
    precision = max(1.0, float(scaled[scaled.isfinite()].abs().max()) / 16)  # fp32 holds logits of 16 to 1e-6
    assert abs(logprob - float(table[token])) <= 1e-6 * precision + 3e-7 * abs(logprob)
    if temperature == 0:
        assert token == int(logits.argmax())
        return
    p = table.exp()
    assert p[token] > 0
    allowed = 1e-6 * precision
    likeliest = p.sort(descending=True).values[: top_k or None]
    before = likeliest.cumsum(0) - likeliest
    low, high = (likeliest[before < (top_p + off) * likeliest.sum()][-1] for off in (allowed, -min(allowed, top_p / 2)))
    # Rounding can make tokens of nearly equal probability equal.
    issue = p[(p >= low * (1 - 3e-7 * precision)) & (p <= high * (1 + 3e-7 * precision))].unique()
    for least in issue[torch.linspace(0, len(issue) - 1, min(len(issue), 20)).long()]:
        kept = torch.where(p >= least, p, 0.0)
        end, share = float(kept[: token + 1].sum() / kept.sum()), float(kept[token] / kept.sum())
        if share > 0 and end - share - allowed <= random <= end + allowed:
            return
    raise AssertionError(f"token {token} of probability {float(p[token])} is not that of {random}")


@pytest.fixture
def check_sample():
    """`check_row` for every row: logits [S,V], randoms [S], the outputs of `sample_tokens`, and its settings."""

    def check(logits, randoms, outputs, temperature=1.0, top_k=0, top_p=1.0):
        ids, logprobs = outputs
        assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
        assert ids.shape == logprobs.shape == randoms.shape
        for row in zip(logits.cpu(), randoms.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
            check_row(*row, temperature, top_k, top_p)

    return check


@pytest.fixture
def small_chunks(monkeypatch):
    """Make the head use several chunks at test sizes."""
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 7)
    monkeypatch.setitem(_linear_chunks._CHUNK_BYTES, "cpu", 1)


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    """Skip needless work of Triton's interpreter: a third of its time (2 cores of a CPU, Triton 3.9, November 2026).

    On every call between functions it lists the members of `triton.language` to replace the builtins among them. Here
    they are listed once, and replaced only if they are not yet. It also computes whether integers overflow, and drops
    the result unless its option `debug` is set.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names: dict[object, list[str]] = {}  # by module or class

    def replace(package, builder, scope):
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        # Either all builtins of a package are replaced, or none.
        if names[package] and is_builtin(getattr(package, names[package][0])):
            for name in names[package]:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace)
        patch.setattr(builder, "options", options)
        yield


@pytest.fixture(autouse=True, scope="session")
def _watched_interpreter():
    """Watch the memory and races of every kernel that Triton's interpreter runs.

    Uninitialized memory holds NaN or the largest integer, so a result that depends on it is noticed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from interpreted_memory import watched

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory
    with watched():
        yield
    torch.use_deterministic_algorithms(False)
