"""The pack's methods give the same in every way in which ComfyUI shares a device's memory.

The truth is the same computation with all models whole on the device. Weights are the same bytes wherever they lie, so
only the order of sums may differ: between kernels of a real GPU, and on the simulated device where memory begins at
another alignment.
"""

import functools

import pytest
import torch
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.settings import Cures
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry
from support.devices import ON_CPU, SIMULATED, memory_mode
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.styles import masks, random_lora
from support.styles import sample as sample_guider

pytestmark = pytest.mark.skipif(ON_CPU, reason="compares ways to share a device's memory: PASTICHE_TEST_DEVICE=simulated or cuda")


def assert_same(found, expected, share=1e-4):
    """share: of the largest value, what another order of sums may change; on a real GPU ten times as much."""
    found, expected = found.cpu(), expected.cpu()
    share = share if SIMULATED else 10 * share
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def whole():
    """The mode in which the expected values are made; the models of the test's own mode are gone by then."""
    return memory_mode("default")


@functools.cache
def expected(run, *arguments):
    """What `run` gives with all models whole; made once for all modes."""
    with whole():
        return run(*arguments)


def styled(memory, streams="self_attention", dtype=torch.float32, scale=1.0):
    """A StyleID run on a small U-Net: inversion, capture into `memory`, injection, sampling. scale: of its latents."""
    model = tiny_unet(dtype=dtype, cast=dtype)
    sigmas, positive = schedule(model, 3), tiny_cond(model)
    runs = [invert(model, {"samples": scale * random_latent(8, 8, seed=seed)}, sigmas, positive, "next") for seed in (1, 2)]
    content, style = (capture(model, run[1], streams, "6-11", memory, "full") for run in runs)
    patched = inject_style(model, style=style, content=content, gamma=0.75, temperature=1.5, strength=1.0, layers="6-11",
                           start_percent=0.0, end_percent=1.0, mask=None)
    return sample(patched, runs[0][0]["samples"], sigmas, positive)


@pytest.mark.device("default", "partial", "novram", "dynamic-small")
@pytest.mark.parametrize("features", ["vram", "recompute"])
def test_style_injection(memory, features):
    assert_same(styled(features), expected(styled, "ram"))


@pytest.mark.device("default", "partial", "dynamic-small")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_style_injection_in_half_precision(memory, dtype):
    """Features computed anew round otherwise than those in memory: that changes no more than rounding the latents otherwise does."""
    kept, rounded = (expected(styled, "ram", "self_attention", dtype, scale).cpu() for scale in (1.0, 1 + torch.finfo(dtype).eps))
    assert float((styled("recompute", dtype=dtype).cpu() - kept).abs().max()) <= float((rounded - kept).abs().max())


def referenced(dtype):
    """Two pictures with weights, a content's inversion, a soft mask, statistics, under guidance."""
    model = tiny_unet(dtype=dtype, cast=dtype)
    sigmas, positive, negative = schedule(model, 3), tiny_cond(model), tiny_cond(model, seed=9)
    noise, content = invert(model, {"samples": random_latent(8, 8, seed=1)}, sigmas, positive, "next")
    patched = style_reference(
        model, {"samples": random_latent(8, 8, seed=2, batch=2)}, None, content, share="join", gamma=0.75, gamma_end=0.25, schedule="cosine",
        temperature=1.2, strength=0.8, layers="6-11", start_percent=0.0, end_percent=1.0, mask=masks(2)[0], weights="1, 3",
        cures=Cures(key_scale=1.1, token_adain=0.5, leak_guard=0.5),
    )
    return sample(patched, noise["samples"], sigmas, positive, negative, cfg=3.0)


@pytest.mark.device("default", "partial", "novram", "dynamic-small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_style_reference(memory, dtype):
    found = referenced(dtype)
    assert_same(found, expected(referenced, dtype), max(1e-4, 4 * torch.finfo(dtype).eps))
    assert found.isfinite().all()


def several_styles():
    model = tiny_unet()
    entries = [StyleEntry(lora=random_lora(model, i), conditioning=tiny_cond(model, seed=i), mask=mask)
               for i, mask in enumerate(masks(2), 1)]
    return sample_guider(multi_style_guider(model, tiny_cond(model), tiny_cond(model, seed=9), 3.0, entries))


@pytest.mark.device("partial", "novram", "dynamic", "dynamic-small")
def test_several_styles_in_one_forward(memory):
    assert_same(several_styles(), expected(several_styles))


def mini_model():
    model, vae, conds = load_mini()
    latent = vae.encode(torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
    positive = next(iter(conds.values()))
    return latent, vae.decode(sample(model, latent, schedule(model, 2), positive))


@pytest.mark.device("partial", "novram", "dynamic", "dynamic-small")
def test_mini_model_and_its_vae(memory):
    for ours, whole_ones in zip(mini_model(), expected(mini_model)):
        assert_same(ours, whole_ones)


@pytest.mark.device("partial", "novram", "dynamic-small")
def test_fastsam(memory):
    pytest.importorskip("ultralytics")
    from pastiche.nodes.host.fastsam.checkpoint import SegmenterWeights
    from pastiche.nodes.host.fastsam.network import TorchNetwork
    from support import segmenters

    network = TorchNetwork(SegmenterWeights(0.33, 0.0625, 1024, 64, segmenters.random_network().state_dict()), "tiny")
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = network(picture)
    with whole():
        for ours, expected in zip(found, network(picture)):
            assert_same(ours, expected)


@pytest.mark.device("partial", "novram", "dynamic-small")
def test_clip_folder(memory, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from pastiche.nodes.host.fastsam.text import FolderEncoder

    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 40, **layers}, vision_config={"image_size": 32, "patch_size": 8, **layers}, projection_dim=24
    )
    transformers.CLIPModel(config).eval().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    image = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    found = FolderEncoder(str(tmp_path)).embed_images(image)
    with whole():
        assert_same(found, FolderEncoder(str(tmp_path)).embed_images(image))
