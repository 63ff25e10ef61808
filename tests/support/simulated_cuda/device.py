"""torch.cuda for the simulated device: import it after `build.load`, see the package's description."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

if torch.version.cuda is not None:
    raise ImportError("this PyTorch is a CUDA build; the simulated device is for CPU builds only")

_host_registered: dict[int, int] = {}


def install(total: int = 8 << 30) -> None:
    """Lets torch.cuda speak of the device. total: its memory in bytes."""
    if torch.version.cuda is None:
        _patch_torch_cuda()
        torch.empty(1).pin_memory()  # PyTorch asks whether memory is pinned only once the device was initialised
    memory(total)


def memory(total: int) -> None:
    """Sets the device's memory in bytes."""
    torch.ops.simulated_cuda.set_limit(total)


def allocated() -> int:
    """Bytes that device tensors hold now."""
    return torch.ops.simulated_cuda.allocated()


def peak() -> int:
    return torch.ops.simulated_cuda.peak()


def reset_peak() -> None:
    torch.ops.simulated_cuda.reset_peak()


def operators() -> int:
    """How many operators ran on the device so far."""
    return torch.ops.simulated_cuda.operators()


def clear_races() -> None:
    torch.ops.simulated_cuda.clear_races()


def races() -> list[str]:
    """Asynchronous uploads whose source was overwritten before the device was waited for."""
    return list(torch.ops.simulated_cuda.races())


def transfers() -> tuple[int, int]:
    """Asynchronous (uploads, downloads) so far."""
    return torch.ops.simulated_cuda.uploads(), torch.ops.simulated_cuda.downloads()


def synchronize(*_) -> None:
    torch.ops.simulated_cuda.wait()


@contextlib.contextmanager
def mixing(allowed: Callable[[], bool]) -> Iterator[None]:
    """Within it, an operator that reads CPU tensors beside the device's takes them where `allowed()`, which is asked only then."""
    call = ctypes.CFUNCTYPE(ctypes.c_bool)(allowed)
    torch.ops.simulated_cuda.mixing(ctypes.cast(call, ctypes.c_void_p).value)
    try:
        yield
    finally:
        torch.ops.simulated_cuda.mixing(0)


class Stream(torch.Stream):
    """torch.cuda.Stream: a name. Work runs in the order of its calls."""

    def __new__(cls, device=None, priority=0, **_):
        return super().__new__(cls, device=torch.device("cuda", 0), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return True


class Event:
    """torch.cuda.Event that has always happened."""

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, other) -> float:
        return 0.0


class _Runtime:
    """What ComfyUI asks of torch.cuda.cudart()."""

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int = 0) -> int:
        torch.ops.simulated_cuda.pin(address, size)
        _host_registered[address] = size
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        # the driver waits for the device before it unlocks pages
        synchronize()
        torch.ops.simulated_cuda.unpin(address)
        return 0 if _host_registered.pop(address, None) is not None else 1

    @staticmethod
    def cudaGetLastError() -> int:
        return 0

    @staticmethod
    def cudaMemGetInfo(device=0):
        return _mem_get_info()


def _mem_get_info(device=None) -> tuple[int, int]:
    total = torch.ops.simulated_cuda.limit()
    return max(total - allocated(), 0), total


def _memory_stats(device=None) -> dict[str, int]:
    now, most = allocated(), peak()
    stats = {}
    for kind in ("active_bytes", "allocated_bytes", "reserved_bytes", "requested_bytes"):
        stats |= {f"{kind}.all.current": now, f"{kind}.all.peak": most}
    return stats


def _patch_torch_cuda() -> None:
    cuda, current = torch.cuda, Stream()
    stack = [current]
    generator = torch.ops.simulated_cuda.default_generator()
    properties = SimpleNamespace(
        name="simulated CUDA device", major=8, minor=6, multi_processor_count=1, gcnArchName="", is_integrated=0,
        max_threads_per_multi_processor=1536, warp_size=32, regs_per_multiprocessor=65536, uuid="simulated",
    )

    def get_device_properties(device=None):
        properties.total_memory = torch.ops.simulated_cuda.limit()
        return properties

    @contextlib.contextmanager
    def stream(chosen):
        stack.append(chosen or stack[-1])
        try:
            yield
        finally:
            stack.pop()

    class Device:
        def __init__(self, device):
            self.idx = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    def same(value):
        return lambda *_, **__: value

    replacements = {
        "is_available": same(True), "is_initialized": same(True), "init": same(None), "_lazy_init": same(None),
        "_is_compiled": same(True), "_is_in_bad_fork": same(False), "_lazy_call": lambda call, **_: call(),
        "device_count": same(1), "current_device": same(0), "set_device": same(None), "device": Device,
        "_exchange_device": same(0), "_maybe_exchange_device": same(0), "get_device_name": same(properties.name),
        "get_device_properties": get_device_properties, "get_device_capability": same((8, 6)), "is_bf16_supported": same(True),
        "get_arch_list": same(["sm_86"]), "mem_get_info": _mem_get_info, "memory_stats": _memory_stats,
        "memory_allocated": lambda *_: allocated(), "max_memory_allocated": lambda *_: peak(),
        "memory_reserved": lambda *_: allocated(), "max_memory_reserved": lambda *_: peak(),
        "reset_peak_memory_stats": lambda *_: reset_peak(), "empty_cache": same(None), "ipc_collect": same(None),
        "synchronize": synchronize, "Stream": Stream, "Event": Event, "stream": stream,
        "current_stream": lambda *_: stack[-1], "default_stream": same(current), "cudart": same(_Runtime),
        "get_allocator_backend": same("native"), "manual_seed": lambda seed: generator.manual_seed(seed) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(seed) and None, "seed": generator.seed,
        "get_rng_state": lambda *_: generator.get_state(), "set_rng_state": lambda state, *_: generator.set_state(state) and None,
        "get_rng_state_all": lambda: [generator.get_state()], "initial_seed": generator.initial_seed,
        "default_generators": (generator,),
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    for module in (cuda.memory, cuda.random, cuda.streams):
        for name, value in replacements.items():
            if hasattr(module, name):
                setattr(module, name, value)
    for name in ("_cuda_getCurrentRawStream", "_cuda_getCurrentStream", "_cuda_getDefaultStream"):  # torch._dynamo imports them
        if not hasattr(torch._C, name):
            setattr(torch._C, name, same(0))
    def clone(storage):  # a CPU build's storages have no CUDA constructor
        made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
        return made.copy_(storage)

    torch.UntypedStorage.clone = clone
    torch.Event = Event
    torch.version.cuda = "12.8"
    torch.backends.cuda.is_built = same(True)
    torch.backends.cudnn.is_available = same(False)

