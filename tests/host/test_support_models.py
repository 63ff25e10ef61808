"""The shared builders give what the other tests rely on."""

import comfy.model_base
import comfy.sample
import comfy.samplers
import pytest
import torch
from support.models import FAMILIES, load_real, smooth_eps, tiny_cond, tiny_unet


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_unet_samples_with_guidance(family, prediction):
    model = tiny_unet(family, prediction)
    latent = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    out = comfy.sample.sample_custom(
        model, latent, 3.0, comfy.samplers.sampler_object("euler"), sigmas, tiny_cond(model), tiny_cond(model, 5, seed=1),
        torch.zeros_like(latent), disable_pbar=True,
    )
    assert out.shape == latent.shape and out.isfinite().all()


@pytest.mark.parametrize("family, decoder, attention", [("sd15", 12, range(3, 12)), ("sdxl", 9, range(6))])
def test_tiny_unet_has_the_block_positions_of_its_family(family, decoder, attention):
    network = tiny_unet(family).model.diffusion_model
    assert len(network.output_blocks) == decoder
    assert [i for i, block in enumerate(network.output_blocks) if hasattr(block[1:2] and block[1], "transformer_blocks")] == list(attention)


def test_tiny_unet_runs_in_float64_and_is_seeded():
    model = tiny_unet(dtype=torch.float64)
    x, t, context = torch.ones(1, 4, 8, 8).double(), torch.tensor([500.0]), tiny_cond(model)[0][0].double()
    out = model.model.diffusion_model(x, t, context=context)
    assert out.dtype == torch.float64
    assert torch.equal(out, tiny_unet(dtype=torch.float64).model.diffusion_model(x, t, context=context))
    assert not torch.equal(out, tiny_unet(dtype=torch.float64, seed=1).model.diffusion_model(x, t, context=context))


def test_smooth_eps_depends_on_position_and_context():
    model = smooth_eps(tiny_unet())
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wrapper = model.model_options["model_function_wrapper"]

    def run(x, context):
        return wrapper(None, {"input": x, "timestep": torch.tensor([1.0]), "c": {"c_crossattn": context}})

    base = run(x, torch.zeros(1, 3, 32))
    assert not torch.equal(base, run(x, torch.ones(1, 3, 32)))
    assert not torch.allclose(base.roll(1, 0), run(x.flip(-1), torch.zeros(1, 3, 32)).flip(-1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd20", "sd20-v", "sdxl"])
def test_comfyui_recognises_the_real_formats(family):
    model = load_real(family)
    assert type(model.model.model_config).__name__ == {"sd15": "SD15", "sdxl": "SDXL"}.get(family, "SD20")
    expected = comfy.model_base.ModelType.V_PREDICTION if family == "sd20-v" else comfy.model_base.ModelType.EPS
    assert model.model.model_type == expected
