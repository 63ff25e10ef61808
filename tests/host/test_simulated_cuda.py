"""The simulated device does what a CUDA device does, and is stricter where its description says so."""

import contextlib

import pytest
from support.devices import SIMULATED, memory_mode

if not SIMULATED:
    pytest.skip("runs with PASTICHE_TEST_DEVICE=simulated", allow_module_level=True)

import numpy
import torch
import torch.nn.functional as F
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.simulated_cuda import device

pytestmark = pytest.mark.strict


def cpu():
    return torch.ones(3, 4)


def gpu():
    return torch.ones(3, 4, device="cuda")


INDEX = torch.tensor([0, 2])
PAGEABLE = torch.ones(5)  # made before anything was pinned: what ComfyUI pinned and freed again may lie where a new tensor does
RAISES = {
    "gpu + cpu": lambda: gpu() + cpu(),
    "cpu + gpu": lambda: cpu() + gpu(),
    "cpu * gpu scalar": lambda: cpu() * gpu().sum(),
    "cpu in place": lambda: cpu().add_(gpu()),
    "cpu scalar in place": lambda: torch.tensor(1.0).add_(gpu().sum()),
    "cat": lambda: torch.cat([gpu(), cpu()]),
    "matmul": lambda: gpu() @ cpu().T,
    "where": lambda: torch.where(cpu() > 0, gpu(), gpu()),
    "masked_fill": lambda: gpu().masked_fill(cpu() > 0, 1.0),
    "index_select": lambda: gpu().index_select(0, INDEX),
    "gather": lambda: torch.gather(gpu(), 0, torch.zeros(3, 4, dtype=torch.long)),
    "gpu index into cpu": lambda: cpu()[INDEX.cuda()],
    "assigned cpu values": lambda: gpu().__setitem__(INDEX, torch.ones(2, 4)),
    "embedding": lambda: F.embedding(INDEX, gpu()),
    "conv": lambda: F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3, device="cuda")),
    "searchsorted": lambda: torch.searchsorted(torch.tensor([0.0, 1.0]), gpu()),
    "equal": lambda: torch.equal(gpu(), cpu()),
    "numpy": lambda: gpu().numpy(),
    "numpy.asarray": lambda: numpy.asarray(gpu()),
    "cpu generator on gpu": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "gpu generator on cpu": lambda: torch.randn(3, generator=torch.Generator("cuda").manual_seed(1)),
}


@pytest.mark.parametrize("wrong", RAISES.values(), ids=RAISES)
def test_devices_do_not_mix(wrong):
    with pytest.raises((RuntimeError, TypeError)):
        wrong()


def test_only_what_is_read_may_mix_where_the_asked_agrees():
    asked = []
    with device.mixing(lambda: asked.append("asked") or True):
        assert (gpu() + cpu()).is_cuda and torch.cat([cpu(), gpu()]).sum() == 24 and cpu()[INDEX.cuda()].is_cuda
        assert asked
        asked.clear()
        assert (gpu() + gpu()).is_cuda and not asked
        with pytest.raises(RuntimeError, match="same device"):
            cpu().add_(gpu())
    for allowed in (device.mixing(lambda: False), contextlib.nullcontext()):
        with allowed, pytest.raises(RuntimeError, match="same device"):
            gpu() + cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bit_floats_are_exact_sums_of_that_type(dtype):
    """Of small whole numbers: every order of adding in float32 gives the same."""
    image, kernel, rows = (torch.randint(-4, 5, shape).float() for shape in ((1, 6, 9, 9), (5, 6, 3, 3), (7, 300)))
    for run, *tensors in ((F.conv2d, image, kernel), (F.linear, rows, rows), (torch.bmm, rows[None], rows.T[None])):
        small = [tensor.to("cuda", dtype).requires_grad_() for tensor in tensors]
        large = [tensor.clone().requires_grad_() for tensor in tensors]
        found, expected = run(*small), run(*large)
        found.sum().backward()
        expected.sum().backward()
        assert found.dtype == dtype and torch.equal(found.cpu(), expected.to(dtype))
        assert all(torch.equal(a.grad.cpu(), b.grad.to(dtype)) for a, b in zip(small, large))


def test_types_do_not_mix_either():
    for run, *shapes in ((F.conv2d, (1, 1, 4, 4), (1, 1, 3, 3)), (F.linear, (2, 3), (4, 3))):
        a, b = (torch.ones(shape, device="cuda") for shape in shapes)
        with pytest.raises(RuntimeError, match="type"):
            run(a.half(), b)


def test_what_may_mix():
    assert (gpu() * torch.tensor(2.0)).sum().item() == 24
    assert gpu()[INDEX].is_cuda and gpu()[:, torch.tensor([True, False, True, False])].shape == (3, 2)
    assert gpu().cpu().numpy().sum() == 12 and gpu().tolist() == cpu().tolist()


def test_views_are_views():
    whole = gpu()
    view = whole[:, 1]
    view.zero_()
    assert whole.sum().item() == 9 and view.is_cuda


def test_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    x = torch.randn(2, 4, 3, 3)
    expected = layers(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    layers.cuda()
    found = layers(x.cuda())
    found.sum().backward()
    assert torch.equal(found.cpu(), expected)
    assert all(torch.equal(p.grad.cpu(), g) for p, g in zip(layers.parameters(), gradients))
    torch.optim.AdamW(layers.parameters(), fused=True).step()
    assert all(p.is_cuda for p in layers.parameters()) and not any(p.is_cuda for p in layers.cpu().parameters())


def test_attention():
    q = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = F.scaled_dot_product_attention(q.cuda(), q.cuda(), q.cuda())
    weights = torch.softmax(q @ q.mT / 8**0.5, -1)
    assert found.is_cuda and torch.allclose(found.cpu(), weights @ q, rtol=1e-12, atol=1e-12)


def test_inference_mode():
    whole = gpu()
    with torch.inference_mode():
        assert torch.ones(3, device="cuda")[1].item() == 1 and whole[0].is_cuda


def test_an_upload_whose_source_changes_is_a_race():
    pinned = torch.ones(5).pin_memory()
    assert pinned.is_pinned() and not PAGEABLE.is_pinned()
    pinned.to("cuda", non_blocking=True)
    pinned.fill_(3)
    assert len(device.races()) == 1
    device.clear_races()


def test_a_download_is_not_there_before_the_wait():
    pinned = torch.empty(5).pin_memory()
    pinned.copy_(torch.ones(5, device="cuda"), non_blocking=True)
    assert pinned.isnan().all()
    torch.cuda.synchronize()
    assert pinned.tolist() == [1.0] * 5
    fresh = torch.ones(5, device="cuda").to("cpu", non_blocking=True)  # into memory that PyTorch pins itself
    assert fresh.isnan().all()
    torch.cuda.synchronize()
    assert fresh.tolist() == [1.0] * 5


def test_new_memory_is_nan_and_counted():
    before = device.allocated()
    big = torch.empty(1 << 20, device="cuda")
    assert device.allocated() == before + (4 << 20)
    whole = bool(big.isnan().all())
    del big
    assert whole
    assert device.allocated() == before


def test_memory_ends():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 34, device="cuda")


def on_device(model) -> int:
    """Bytes of a model's parameters that are on the device now."""
    return sum(p.nbytes for p in model.model.parameters() if p.is_cuda)


@pytest.mark.device
def test_core_samples_the_same_in_every_memory_mode(memory):
    model = tiny_unet()
    x, cond, sigmas = random_latent(), tiny_cond(model), schedule(model, 2)
    found = sample(model, x, sigmas, cond)
    resident = on_device(model)
    if memory in ("default", "partial", "novram"):
        share = resident / sum(p.nbytes for p in model.model.parameters())
        assert {"default": share == 1, "partial": 0.3 < share < 0.5, "novram": share < 0.05}[memory], share
    else:
        assert model.is_dynamic()
    with memory_mode("default"):  # within the test's own
        whole = tiny_unet()
        expected = sample(whole, x, sigmas, cond)
        assert on_device(whole) == sum(p.nbytes for p in whole.model.parameters()) and not whole.is_dynamic()
    again = tiny_unet()
    for other in (sample(again, x, sigmas, cond), expected):  # up to sums in another order, at another alignment of memory
        torch.testing.assert_close(found, other, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert again.is_dynamic() == model.is_dynamic() and on_device(again) == resident
