"""Inversion on flow models and videos, and its NOISE: round trips through core's own sampler nodes.

The models are exact: every latent value is drawn from a mixture of two Gaussians, whose denoised mean is known.
"""

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_sampling
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_extras.nodes_custom_sampler import (
    BasicGuider, DisableNoise, KSamplerSelect, RandomNoise, SamplerCustom, SamplerCustomAdvanced, SplitSigmas,
)
from pastiche.nodes.host.trajectories.inversion import invert, inverted_noise, reconstruct
from pastiche.nodes.host.trajectories.noise import InvertedNoise
from pastiche.nodes.inversion import DDIMInversion, InversionReport, MidpointSampler
from pastiche.nodes.styleid import LatentAdaIN
from support.families import family_cond, family_latent, tiny_model
from support.models import tiny_cond, tiny_unet
from support.sampling import cancelled_at, random_latent, schedule

MEANS, WIDTH = (-0.7, 0.9), 0.6


def mixture(prediction, channels=4, latent_format=None):
    """A MODEL whose denoised latent is the posterior mean of a two-Gaussian mixture: a closed form."""
    model = tiny_unet(prediction=prediction, in_channels=channels)
    if latent_format is not None:
        model.model.latent_format = latent_format

    def predict(apply_model, args):
        x = args["input"].double()
        sigma = args["timestep"].double().view(-1, *[1] * (x.ndim - 1))
        keep = 1 - sigma if prediction == "flow" else torch.ones_like(sigma)  # x = keep * clean + sigma * noise
        variance = (keep * WIDTH) ** 2 + sigma**2
        logits = torch.stack([-((x - keep * mean) ** 2) / (2 * variance) for mean in MEANS])
        means = torch.stack([mean + keep * WIDTH**2 / variance * (x - keep * mean) for mean in MEANS])
        return (logits.softmax(0) * means).sum(0).float()

    exact = model.clone()
    exact.set_model_unet_function_wrapper(predict)
    return exact


@pytest.fixture(scope="module")
def models():
    return {name: mixture(name) for name in ("eps", "v", "flow")}


@pytest.fixture(scope="module")
def positive(models):
    return tiny_cond(models["eps"])


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def clean(shape, seed=0):
    """(B, C, ...) latents like SD1.5's, so that in model space they are the mixture's."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, shape, generator=generator)
    return (torch.tensor(MEANS)[side] + WIDTH * torch.randn(shape, generator=generator)) / 0.18215


def advanced(model, positive, noise, sigmas, latent, sampler="euler"):
    """Core's SamplerCustomAdvanced with a Basic Guider."""
    guider = BasicGuider.execute(model, positive).result[0]
    return SamplerCustomAdvanced.execute(noise, guider, KSamplerSelect.execute(sampler).result[0], sigmas, latent).result[0]


SHAPES = [(2, 4, 6, 10), (2, 4, 3, 6, 10)]


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "video"])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("latent_image", ["empty", "content"])
def test_noise_takes_cores_sampler_back_to_the_clean_latent(models, positive, shape, prediction, latent_image):
    model, latent = models[prediction], {"samples": clean(shape)}
    sigmas = schedule(model, 30, "simple")
    _, trajectory, noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive, "fixed_point", 40, tolerance=0.0).result
    assert trajectory.latents.shape == (31, *shape)
    start = {"samples": torch.zeros(shape)} if latent_image == "empty" else latent
    back = advanced(model, positive, noise, sigmas, start)["samples"]
    assert relative(back, latent["samples"]) < 1e-5


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_predicted_undoes_better_than_next_with_as_many_evaluations(models, positive, prediction):
    model, latent = models[prediction], {"samples": clean((1, 4, 6, 10))}
    error, sigmas = {}, schedule(model, 20, "simple")
    for scheme in ("predicted", "next"):
        noise = DDIMInversion.execute(model, latent, sigmas, positive, scheme).result[2]
        back = advanced(model, positive, noise, sigmas, {"samples": torch.zeros(1, 4, 6, 10)})["samples"]
        error[scheme] = relative(back, latent["samples"])
    assert error["predicted"] < 0.75 * error["next"]


def test_midpoint_on_a_flow_is_nearer_to_its_ode_than_next(models, positive):
    """Against the ODE itself, solved with many steps."""
    model, latent = models["flow"], {"samples": clean((1, 4, 4, 4))}
    exact = invert(model, latent, schedule(model, 160, "simple"), positive, "midpoint")[1].latents[-1]
    error = {
        scheme: relative(invert(model, latent, schedule(model, 16, "simple"), positive, scheme)[1].latents[-1], exact)
        for scheme in ("midpoint", "next", "predicted")
    }
    assert error["midpoint"] < 0.25 * error["next"] and error["midpoint"] < 0.25 * error["predicted"]


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_midpoint_sampler_undoes_midpoint_to_second_order(models, positive, prediction):
    model, latent = models[prediction], {"samples": clean((1, 4, 4, 6))}
    sampler, errors = MidpointSampler.execute().result[0], {}
    for steps in (16, 32):
        sigmas = schedule(model, steps, "simple")
        _, trajectory = invert(model, latent, sigmas, positive, "midpoint")
        errors[steps] = relative(reconstruct(model, trajectory, sampler), latent["samples"])
        if steps == 16:
            assert errors[16] < 0.3 * relative(reconstruct(model, trajectory), latent["samples"])  # than with euler
    assert errors[32] < errors[16] / 3


def test_the_midpoint_sampler_asks_once_a_step_and_stops_on_cancel(models, positive):
    model, levels = cancelled_at(models["flow"], 6)
    sigmas = torch.tensor([1.0, 0.5, 0.2, 0.0])
    noise = InvertedNoise(model, sigmas, torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)))
    for _ in range(2):
        guider, empty = BasicGuider.execute(model, positive).result[0], {"samples": torch.zeros(1, 4, 4, 6)}
        if levels:
            with pytest.raises(management.InterruptProcessingException):
                SamplerCustomAdvanced.execute(noise, guider, MidpointSampler.execute().result[0], sigmas, empty)
        else:
            SamplerCustomAdvanced.execute(noise, guider, MidpointSampler.execute().result[0], sigmas, empty)
            assert levels == pytest.approx([0.75, 0.75, 0.35, 0.1])
    assert len(levels) == 6


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_split_schedules_go_on_from_there(models, positive, prediction):
    model, latent = models[prediction], {"samples": clean((1, 4, 6, 10))}
    sigmas = schedule(model, 20, "simple")
    _, _, noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive, "fixed_point", 40, tolerance=0.0).result
    high, low = SplitSigmas.execute(sigmas, 8).result
    halfway = advanced(model, positive, noise, high, {"samples": torch.zeros(1, 4, 6, 10)})
    back = advanced(model, positive, DisableNoise.execute().result[0], low, halfway)["samples"]
    assert relative(back, latent["samples"]) < 1e-5


def test_the_latent_of_a_flow_model_is_refused_where_the_sampler_would_erase_it(models, positive):
    """The defect: sampling gives 1e-7 of the content without a word."""
    model, latent = models["flow"], {"samples": clean((1, 4, 6, 10))}
    sigmas = schedule(model, 10, "simple")
    blocked, _, noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive).result
    assert isinstance(blocked, ExecutionBlocker) and "NOISE" in blocked.message and "SamplerCustomAdvanced" in blocked.message
    erased = {"samples": noise.as_latent()}
    blank = SamplerCustom.execute(model, False, 0, 1.0, positive, positive, KSamplerSelect.execute("euler").result[0], sigmas, erased)
    assert relative(blank.result[0]["samples"], latent["samples"]) > 0.5  # what the refusal saves users from


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_latent_without_added_noise_is_exact_where_it_is_given(models, positive, prediction):
    """Partial inversions (denoise below 1) of flow models too."""
    model, latent = models[prediction], {"samples": clean((1, 4, 6, 10))}
    sigmas = schedule(model, 30, "simple")[10:]
    noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive, "fixed_point", 40, tolerance=0.0).result
    sampler = KSamplerSelect.execute("euler").result[0]
    back = SamplerCustom.execute(model, False, 0, 1.0, positive, positive, sampler, sigmas, noise).result[0]["samples"]
    assert relative(back, latent["samples"]) < 1e-5


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_report_shows_what_cores_sampler_gives(models, positive, prediction):
    class Decoder:
        def decode(self, latent):  # BC... -> B...C
            return latent.movedim(1, -1)[..., :3] / 8 + 0.5

    model, latent = models[prediction], {"samples": clean((1, 4, 2, 6, 10))}
    sigmas = schedule(model, 5, "simple")
    _, trajectory, noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive, "next").result
    sampled = advanced(model, positive, noise, sigmas, {"samples": torch.zeros(1, 4, 2, 6, 10)})["samples"]
    assert torch.equal(reconstruct(model, trajectory), sampled)
    image = InversionReport.execute(model, trajectory, Decoder()).result[0]
    assert image.shape == (2, 6, 30, 3)
    assert torch.allclose(image[:, :, 10:20], Decoder().decode(sampled)[0], atol=1e-6)


def test_a_four_dimensional_latent_of_a_video_model_gets_its_frames():
    model = mixture("flow", channels=16, latent_format=comfy.latent_formats.Wan21())
    latent, sigmas = {"samples": torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(0))}, schedule(model, 20, "simple")
    positive = tiny_cond(model)
    _, trajectory, noise, *_ = DDIMInversion.execute(model, latent, sigmas, positive, "fixed_point", 40, tolerance=0.0).result
    assert trajectory.latents.shape == (21, 1, 16, 1, 6, 4)
    back = advanced(model, positive, noise, sigmas, {"samples": torch.zeros(1, 16, 6, 4)})["samples"]
    assert relative(back[:, :, 0], latent["samples"]) < 1e-5


def test_batches_of_videos_equal_single_runs(models, positive):
    model, latent = models["flow"], clean((3, 4, 2, 4, 6))
    sigmas = schedule(model, 6, "simple")
    together = invert(model, {"samples": latent}, sigmas, positive)[1].latents
    for i in range(3):
        alone = invert(model, {"samples": latent[i : i + 1]}, sigmas, positive)[1].latents
        assert relative(together[:, i : i + 1], alone) < 1e-5


def test_cancel_stops_a_flow_inversion_within_a_step(models, positive):
    model, levels = cancelled_at(models["flow"], 3)
    with pytest.raises(management.InterruptProcessingException):
        invert(model, {"samples": clean((1, 4, 4, 4))}, schedule(model, 20, "simple"), positive)
    assert len(levels) == 3


def test_a_latent_of_another_size_or_batch_gets_a_sentence(models, positive):
    model = models["flow"]
    _, trajectory = invert(model, {"samples": clean((2, 4, 6, 10))}, schedule(model, 2, "simple"), positive)
    noise = inverted_noise(model, trajectory)
    for shape in ((2, 4, 6, 8), (1, 4, 6, 10), (2, 4, 1, 6, 10)):
        with pytest.raises(ValueError, match="latent_image is"):
            noise.generate_noise({"samples": torch.zeros(shape)})


def test_a_model_that_takes_no_noise_asks_for_the_latent(models):
    """Core's IMG_TO_IMG_FLOW starts from the latent alone."""
    model = models["flow"].clone()

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.IMG_TO_IMG_FLOW):
        pass

    model.add_object_patch("model_sampling", Sampling())
    noise = InvertedNoise(model, torch.tensor([1.0, 0.5, 0.0]), random_latent())
    with pytest.raises(ValueError, match="latent output to the sampler"):
        noise.generate_noise({"samples": random_latent()})
    assert noise.latent_refusal() is None


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "video"])
def test_adain_of_two_noises_gives_a_noise_with_the_styles_statistics(models, shape):
    model = models["flow"]
    sigmas = schedule(model, 4, "simple")
    content = InvertedNoise(model, sigmas, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    style = InvertedNoise(model, sigmas, 2 + 3 * torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(2)))
    blocked, noise = LatentAdaIN.execute(content, style).result
    assert isinstance(blocked, ExecutionBlocker) and "NOISE" in blocked.message
    spatial = tuple(range(2, len(shape)))
    for statistic in (torch.mean, torch.std):
        expected = statistic(style.latent, dim=spatial).expand(shape[:2])
        assert torch.allclose(statistic(noise.latent, dim=spatial), expected, atol=1e-4)
    assert torch.equal(LatentAdaIN.execute(content, style, 0.0).result[1].latent, content.latent)
    assert torch.equal(LatentAdaIN.execute(content, style, 1.0, torch.zeros(1, 48, 80)).result[1].latent, content.latent)


def test_adain_refuses_what_is_no_inversion(models):
    model = models["eps"]
    inverted = InvertedNoise(model, schedule(model, 2), random_latent())
    for pair in ((inverted, {"samples": random_latent()}), (RandomNoise.execute(0).result[0], inverted)):
        with pytest.raises(ValueError, match="NOISE on both"):
            LatentAdaIN.execute(*pair)
    latent, missing = LatentAdaIN.execute({"samples": random_latent()}, {"samples": random_latent(seed=1)}).result
    assert latent["samples"].shape == (1, 4, 8, 8) and isinstance(missing, ExecutionBlocker)


def test_a_model_with_an_injection_is_refused(models, positive):
    from pastiche.nodes.host.injections.keep_outside import keep_content_outside

    model, latent = models["eps"], {"samples": clean((1, 4, 8, 8))}
    sigmas = schedule(model, 2, "simple")
    _, trajectory = invert(model, latent, sigmas, positive)
    injected = keep_content_outside(model, trajectory, torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="already carries Keep Outside Mask"):
        invert(injected, latent, sigmas, positive)


def test_a_network_without_a_known_empty_prompt_asks_for_one(models):
    model = tiny_unet()
    model.model.diffusion_model = torch.nn.Identity()
    with pytest.raises(ValueError, match="positive: .* CLIP Text Encode"):
        invert(model, {"samples": clean((1, 4, 8, 8))}, schedule(model, 2))


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3", "qwen_image", "z_image", "wan", "hunyuan_video", "ltxv", "cosmos_predict2", "aura_flow"])
def test_samplers_of_real_families_start_at_the_inverted_latent(name):
    """Whatever latent_image is. The networks are ComfyUI's own, so every latent format, shift and dimension is."""
    model, cond, starts = tiny_model(name).clone(), family_cond(name), []
    latent = {"samples": family_latent(name)}

    def wrapper(apply_model, args):
        starts.append(args["input"].float().clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    sigmas = schedule(model, 2, "simple")
    _, trajectory, noise, *_ = DDIMInversion.execute(model, latent, sigmas, cond, "next").result
    assert torch.isfinite(trajectory.latents).all()
    for image in (latent["samples"], torch.zeros_like(latent["samples"])):
        starts.clear()
        advanced(model, cond, noise, sigmas, {"samples": image})
        assert relative(starts[0], trajectory.latents[-1]) < 1e-5
