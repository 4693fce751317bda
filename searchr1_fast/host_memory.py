"""Page-locked host memory, for what leaves a GPU for a time."""

from __future__ import annotations

import weakref

import torch


def host_memory(num_bytes: int, device: torch.device, setting: str = "model.offload") -> torch.Tensor:
    """[num_bytes] uint8, zeros; page-locked if the device is a GPU, so that copies overlap and need no other buffer.

    It is registered, not made by `pin_memory`: torch's allocator of page-locked memory rounds up to a power of two.
    ValueError, naming the `setting` that asked for it, if the machine will not lock this much.
    """
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and num_bytes:
        runtime = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        if status:
            raise ValueError(
                f"{setting}: {num_bytes / 2**30:.1f} GiB of host memory could not be page-locked (CUDA error "
                f"{status}); switch it off, or a part of it, or give this process more memory"
            )
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory
