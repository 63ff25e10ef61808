"""Where features live: the bytes are there when read, exactly the memory that is said, files that change on the disk."""

import gc
import os

import comfy.model_management
import pytest
import torch
from pastiche.nodes.host.features.stores import FileStore, FileWriter, MemoryStore
from pastiche.nodes.sockets import FeatureKey
from support.devices import ON_CPU, SIMULATED
from torch.utils._python_dispatch import TorchDispatchMode

KEYS = [FeatureKey("self_attention", "output", number, 0) for number in (3, 7)]
SHAPES = {KEYS[0]: (2, 3, 5), KEYS[1]: (1, 7)}
CPU = torch.device("cpu")
needs_device = pytest.mark.skipif(ON_CPU, reason="needs a device, real or simulated")


def values(key, step):
    count = torch.Size(SHAPES[key]).numel()
    return (torch.arange(count, dtype=torch.float32).view(SHAPES[key]) + 100 * step + 1000 * KEYS.index(key)) / 8


def fill(store):
    for key in KEYS:
        for step in (1, 2):
            store.write(key, step, values(key, step).to(store.read(key, 1, CPU).dtype))
    return store


@pytest.fixture
def path(tmp_path):
    writer = FileWriter(
        tmp_path / "features.safetensors", {str(key): (2, *SHAPES[key]) for key in KEYS}, dict.fromkeys(map(str, KEYS), torch.float16), {}
    )
    for key in KEYS:
        for step in (1, 2):
            writer.write(key, step, values(key, step))
    return writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["ram", "device"])
def test_memory_holds_every_step_of_every_tensor(where, dtype):
    device = CPU if where == "ram" else comfy.model_management.get_torch_device()
    store = fill(MemoryStore(SHAPES, 2, dtype, device))
    assert store.nbytes == 2 * (30 + 7) * dtype.itemsize
    for key in KEYS:
        for step in (1, 2):
            assert torch.equal(store.read(key, step, CPU), values(key, step).to(dtype))


@needs_device
def test_vram_features_are_there_when_read_to_the_cpu():
    device = comfy.model_management.get_torch_device()
    store = fill(MemoryStore(SHAPES, 2, torch.float32, device))
    assert store.read(KEYS[0], 1, device).device.type == device.type
    assert torch.equal(store.read(KEYS[0], 2, CPU), values(KEYS[0], 2))  # nobody waits for the device in between


class Waits(TorchDispatchMode):
    """Counts what waits for the device: values that Python reads, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        copied = isinstance(found, torch.Tensor) and found.device.type == "cpu" and any(
            isinstance(part, torch.Tensor) and part.device.type != "cpu" for part in args
        )
        self.count += function is torch.ops.aten._local_scalar_dense.default or copied
        return found


@needs_device
def test_writing_to_vram_waits_for_nothing_and_nan_is_told_with_the_same_sentence():
    device = comfy.model_management.get_torch_device()
    store, tensors = MemoryStore(SHAPES, 2, torch.float16, device), {key: values(key, 1).to(device) for key in KEYS}
    with Waits() as waits:
        for key in KEYS:
            for step in (1, 2):
                store.write(key, step, tensors[key])
        assert waits.count == 0
        store.settle()
        asked = waits.count
        assert asked > 0
        store.settle()
        store.read(KEYS[0], 1, device)
        assert waits.count == asked  # once
    for spoiled, finite in ((float("nan"), False), (float("inf"), False), (-1e5, False), (6e4, True)):
        tensor = tensors[KEYS[1]].clone()
        tensor[0, 3] = spoiled
        store = MemoryStore(SHAPES, 2, torch.float16, device)
        store.write(KEYS[1], 1, tensor)
        store.write(KEYS[1], 2, tensors[KEYS[1]])  # what came after does not hide it
        if finite:
            store.settle()
            continue
        told = []
        for look in (store.settle, lambda: store.read(KEYS[0], 1, CPU), lambda: store.copied_to(CPU)):
            with pytest.raises(ValueError, match="NaN or beyond what float16 holds. Set precision to full") as error:
                look()
            told.append(str(error.value))
        with pytest.raises(ValueError) as in_ram:
            MemoryStore(SHAPES, 2, torch.float16, CPU).write(KEYS[1], 1, tensor)
        assert set(told) == {str(in_ram.value)}


def test_a_sealed_store_cannot_be_changed():
    store = fill(MemoryStore(SHAPES, 2, torch.float32, CPU))
    copy = store.copied_to(CPU)
    store.seal()
    store.read(KEYS[0], 1, CPU).zero_()
    assert torch.equal(store.read(KEYS[0], 1, CPU), values(KEYS[0], 1))
    with pytest.raises(ValueError, match="kept for later"):
        store.write(KEYS[0], 1, values(KEYS[0], 2))
    copy.write(KEYS[0], 1, values(KEYS[0], 2))
    assert torch.equal(copy.read(KEYS[1], 2, CPU), values(KEYS[1], 2)) and torch.equal(store.read(KEYS[0], 1, CPU), values(KEYS[0], 1))


@needs_device
def test_ram_features_are_pinned_by_core_in_their_own_size(monkeypatch):
    gc.collect()
    elsewhere, gained = [], 0
    while not gained and len(elsewhere) < 1000:
        before = comfy.model_management.TOTAL_PINNED_MEMORY
        store = MemoryStore(SHAPES, 2, torch.float32, CPU)
        gained = comfy.model_management.TOTAL_PINNED_MEMORY - before
        assert all(tensor.is_pinned() for tensor in store._tensors.values())
        # Core leaves weights of dropped models registered; memory in such a place is pinned already and not counted again.
        elsewhere.append(store)
    assert store.nbytes <= gained < store.nbytes + 64 * len(SHAPES)
    elsewhere.clear()
    del store
    gc.collect()
    assert comfy.model_management.TOTAL_PINNED_MEMORY == before
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", -1)  # --disable-pinned-memory
    pinned = True
    while pinned and len(elsewhere) < 1000:
        store = fill(MemoryStore(SHAPES, 2, torch.float32, CPU))
        pinned = any(tensor.is_pinned() for tensor in store._tensors.values())
        elsewhere.append(store)
    assert not pinned
    assert torch.equal(store.read(KEYS[1], 1, comfy.model_management.get_torch_device()).cpu(), values(KEYS[1], 1))


@pytest.mark.skipif(not SIMULATED, reason="counts the simulated device's memory")
def test_pinned_memory_of_a_bank_is_given_back():
    from support.simulated_cuda import device

    store = MemoryStore({KEYS[0]: (1, 1000, 1000)}, 1, torch.float32, comfy.model_management.get_torch_device())
    held = device.allocated()
    del store
    gc.collect()
    assert held - device.allocated() >= 4_000_000


def test_a_file_is_read_step_by_step(path):
    store = FileStore(path)
    assert sorted(store.tensor_names()) == sorted(map(str, KEYS)) and store.dtype(str(KEYS[0])) is torch.float16
    assert store.shape(str(KEYS[1])) == [2, 1, 7] and store.nbytes == path.stat().st_size
    for key in KEYS:
        assert torch.equal(store.tensor(str(key)), torch.stack([values(key, 1), values(key, 2)]).half())
        for step in (1, 2):
            assert torch.equal(store.read(key, step, CPU), values(key, step).half())


@pytest.mark.parametrize("change", ["cut", "overwritten"])
def test_a_file_that_changes_under_its_reader_is_a_sentence(path, change):
    store = FileStore(path)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(20) if change == "cut" else file.write(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="features.safetensors.*changed on the disk"):
        store.read(KEYS[0], 2, CPU)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace an open file")
def test_a_file_that_is_replaced_stays_readable(path):
    store = FileStore(path)
    other = path.with_name("other")
    other.write_bytes(b"nothing")
    os.replace(other, path)
    assert torch.equal(store.read(KEYS[0], 2, CPU), values(KEYS[0], 2).half())


def test_a_temporary_file_goes_with_its_store(path):
    store = FileStore(path, temporary=True)
    del store
    gc.collect()
    assert not path.exists()


def test_a_type_that_features_never_have_is_a_sentence(tmp_path):
    import safetensors.torch

    file = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({"weights": torch.zeros(2, dtype=torch.int64)}, str(file))
    with pytest.raises(ValueError, match="odd.safetensors.*weights is I64"):
        FileStore(file).tensor("weights")
