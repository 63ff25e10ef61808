"""One pretend CUDA device for a CPU build of PyTorch, to find what only goes wrong on a GPU.

    from support import simulated_cuda
    simulated_cuda.install()              # before torch is imported anywhere
    x = torch.ones(3, device="cuda")      # x.device is cuda:0, x.is_cuda, x.numpy() raises
    x + torch.ones(3)                     # RuntimeError: Expected all tensors to be on the same device
    device.races()                        # asynchronous copies whose source changed too early
    device.memory(64 << 20)               # a device of 64 MiB

`device.cpp` (compiled once by `build`, about 15 s) puts kernels under PyTorch's CUDA key: they check the devices of
their arguments, run the CPU kernel on the same bytes and give CUDA tensors back. `device` makes torch.cuda speak
of it, `dynamic_vram` stands in for comfy_aimdo. ComfyUI takes it for an NVIDIA card: offloading, partial loading,
cast buffers, pinned memory, two offload streams. tests/host/test_simulated_cuda.py proves what is said here.

As on a GPU: CPU and CUDA tensors in one operator raise (0-dim CPU tensors and CPU indices into CUDA tensors may
mix, written ones may not); pinned memory, memory statistics and a memory limit with torch.OutOfMemoryError;
autograd, autocast, GradScaler, fused AdamW. Stricter than most runs on a GPU:
- new device memory holds NaN until it is written;
- a non_blocking download into pinned memory holds NaN until the next wait (synchronize, .item(), a blocking copy ...);
- a non_blocking upload from pinned memory must find its source unchanged at the next wait, else `races` names it;
- evicted slots of dynamic VRAM become NaN at once.

What it cannot show: speed; a GPU's kernels, their rounding and limits; the order of work between streams (one queue, in
call order: a missing wait_stream or record_stream goes unseen); fragmentation; sparse and quantised tensors; Triton,
torch.compile; more than one GPU; MPS, ROCm, XPU, DirectML. Random numbers on the device differ from the CPU's.
"""

from __future__ import annotations


def install(total: int = 8 << 30) -> None:
    """Compiles if need be and makes the device; total: its memory in bytes. Raises BuildError, ImportError."""
    from .build import build, load

    load(build())
    from . import device

    device.install(total)
