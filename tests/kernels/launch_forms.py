"""What Triton would compile for a launch, found without making it, and what a GPU needs for that.

The cases of `compile_report` are what a file of kernels says it is launched with; these are what the host's code does
launch them with. Besides types and constants they hold what Triton finds out by itself: which addresses and numbers are
multiples of 16, and which numbers are 1 or do not fit 32 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from compile_report import compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

ARCHITECTURE = 90
SHARED_BYTES = 227 << 10  # of one program there

_binders: dict[int, Any] = {}  # by kernel


class Form(NamedTuple):
    """What Triton compiles one kernel for."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]  # by place
    attributes: dict[tuple[int, ...], Any]  # by place
    num_warps: int
    num_stages: int

    @property
    def key(self) -> tuple:
        """Equal if Triton would take the kernel that it already has."""
        parts = (self.signature, self.constants, self.attributes)
        numbers = self.num_warps, self.num_stages
        return self.kernel.__name__, *(tuple(sorted((k, repr(v)) for k, v in part.items())) for part in parts), *numbers

    def __str__(self) -> str:
        names = list(self.signature)
        divided = {names[place] for (place, *_), found in self.attributes.items() if "divisibility" in str(found)}
        constants = {names[place]: value for (place, *_), value in self.constants.items()}
        types = {name: kind for name, kind in self.signature.items() if name not in constants}
        return f"{self.kernel.__name__}: {types}, {constants}, 16 divides {sorted(divided)}, {self.num_warps} warps"

    def faults(self) -> list[str]:
        """-> what keeps a Hopper GPU from running it well, or at all."""
        source = (self.kernel, self.signature, self.constants, self.attributes)
        needs = compile_source(*source, self.num_warps, self.num_stages, ARCHITECTURE)
        found = [f"{self}: {needs['stack']} bytes of stack: it spills"] if needs["stack"] else []
        if needs["shared"] > SHARED_BYTES:
            found.append(f"{self}: {needs['shared']} bytes of shared memory, of {SHARED_BYTES}")
        return found


def form_of(kernel: Any, given: tuple, named: dict[str, Any]) -> Form:
    """-> the form of `kernel[grid](*given, **named)`, as the launcher of this Triton finds it."""
    if id(kernel) not in _binders:
        backend = make_backend(GPUTarget("cuda", ARCHITECTURE, 32))
        _binders[id(kernel)] = backend, create_function_from_signature(kernel.signature, kernel.params, backend)
    backend, bind = _binders[id(kernel)]
    named = named | {"debug": False, "enable_fp_fusion": True}  # the defaults; Triton 3.9 warns about the second
    bound, found, options = bind(*given, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, found, options)
    return Form(kernel, signature, constants, attributes, options.num_warps, options.num_stages)
