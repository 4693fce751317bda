"""Count the memory that is alive."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Live bytes of memory that operators have allocated, and their peak: what a GPU's allocator counts.

    Memory from before is not counted, and neither are views. It does not look inside custom operators: call their
    implementations instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.namespace != "searchr1_kernels", f"{function} would hide what it allocates"
        given = {StorageWeakRef(t.untyped_storage()) for t in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        known = given | {reference for reference, _ in self._alive}
        for tensor in tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference not in known:
                known.add(reference)
                self._alive.append((reference, tensor.untyped_storage().nbytes()))
        self._alive = [(reference, size) for reference, size in self._alive if not reference.expired()]
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
