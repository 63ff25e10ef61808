"""StyleID through the nodes' own `execute` on the embedded mini model, whose pictures mean something."""

import logging

import numpy as np
import pytest
import torch
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.features import CaptureFeatures, LoadFeatures, SaveFeatures
from pastiche.nodes.host.trajectories.inversion import reconstruct
from pastiche.nodes.inversion import DDIMInversion, InversionReport
from pastiche.nodes.mini import LoadMini
from pastiche.nodes.styleid import LatentAdaIN, StyleInjection
from PIL import Image
from support.devices import SIMULATED
from support.sampling import sample, schedule


@pytest.fixture(scope="module")
def mini():
    return LoadMini.execute("empty").result


def picture(repository, name, size):
    """Centre square of a sample as IMAGE (1, size, size, 3)."""
    image = Image.open(repository / "assets" / "samples" / name).convert("RGB")
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(image)).float()[None] / 255


class Scene:
    def __init__(self, mini, repository, size=64, steps=6):
        self.model, self.vae, self.empty = mini
        self.sigmas = schedule(self.model, steps)
        self.content = self.prepare(picture(repository, "content_coffee.jpg", size))
        self.style = self.prepare(picture(repository, "style_impasto.png", size))

    def prepare(self, image):
        latent = {"samples": self.vae.encode(image)}
        noise, trajectory, *_ = DDIMInversion.execute(self.model, latent, self.sigmas, self.empty, "fixed_point", 10).result
        return noise, trajectory, CaptureFeatures.execute(self.model, trajectory, "self_attention", "6-11", "ram", "full").result[0]

    def draw(self, model, latent=None):
        return sample(model, (latent or self.content[0])["samples"], self.sigmas, self.empty)


@pytest.fixture(scope="module")
def scene(mini, repository):
    return Scene(mini, repository)


def test_own_features_gamma_1_and_temperature_1_reproduce_the_reconstruction(scene):
    model = StyleInjection.execute(scene.model, scene.content[2], scene.content[2], 1.0, 1.0, layers="6-11").result[0]
    plain = reconstruct(scene.model, scene.content[1])
    assert psnr(scene.draw(model), plain, float(plain.max() - plain.min())) > 45


def test_each_part_moves_the_latent_towards_the_style(scene):
    """Per-channel means and deviations of the clean latent: the style's side of AdaIN, without any network."""

    def distance(latent):
        target = scene.style[1].latents[0]
        latent = scene.model.model.process_latent_in(latent)
        return sum(float((f(latent, dim=(2, 3)) - f(target, dim=(2, 3))).norm()) for f in (torch.mean, torch.std))

    inject = StyleInjection.execute(scene.model, scene.style[2], scene.content[2], 0.75, 1.5, layers="6-11").result[0]
    toned = LatentAdaIN.execute(scene.content[0], scene.style[0]).result[0]
    plain, injected, adain, both = (
        distance(scene.draw(model, latent))
        for model, latent in ((scene.model, None), (inject, None), (scene.model, toned), (inject, toned))
    )
    assert injected < plain and adain < plain and both < plain


def test_fingerprint_of_a_second_load_is_the_same_and_its_features_work(scene):
    """Two Load Mini nodes in one graph are two MODELs of the same weights."""
    other = LoadMini.execute("photo").result[0]
    recomputed = CaptureFeatures.execute(scene.model, scene.style[1], "self_attention", "6-11", "recompute").result[0]
    theirs = StyleInjection.execute(other, recomputed, None, layers="6-11").result[0]
    ours = StyleInjection.execute(scene.model, scene.style[2], None, layers="6-11").result[0]
    expected = scene.draw(ours)
    assert psnr(scene.draw(theirs), expected, float(expected.max() - expected.min())) > 45


def test_save_and_load_give_the_same_picture(scene):
    from pastiche.nodes.host.features.library import register_folder

    register_folder()
    name = SaveFeatures.execute(scene.style[2], "mini_style").result[0]
    bank, trajectory, noise = LoadFeatures.execute(name, scene.model, "disk").result
    assert torch.allclose(noise["samples"], scene.style[0]["samples"], atol=1e-5)
    a, b = (StyleInjection.execute(scene.model, features, scene.content[2], layers="6-11").result[0] for features in (scene.style[2], bank))
    assert torch.equal(scene.draw(a), scene.draw(b))


def test_report_shows_three_pictures_and_both_numbers(mini, scene):
    model, vae, _ = mini
    output = InversionReport.execute(model, scene.content[1], vae)
    image, in_latents, in_pixels = output.result
    assert image.shape == (1, 64, 192, 3)
    before, after, difference = image.split(64, dim=2)
    assert in_pixels == pytest.approx(psnr(after, before, 1.0)) and in_latents > 20
    assert torch.allclose(difference, (0.5 + 10 * (after - before)).clamp(0, 1))
    assert f"{in_pixels:.2f} dB" in output.ui["text"][0] and output.ui["images"]


@pytest.mark.slow
@pytest.mark.skipif(SIMULATED, reason="minutes of arithmetic, on the CPU either way")
def test_round_trip_of_a_photo_that_was_never_trained_on(mini, repository):
    """256 px against the VAE's own decode: next 50 >= 38 dB, `predicted` and `fixed_point` with 20 steps beat it."""
    model, vae, empty = mini
    latent = {"samples": vae.encode(picture(repository, "content_coffee.jpg", 256))}
    target = vae.decode(latent["samples"])

    def quality(scheme, steps, **options):
        _, trajectory, *_ = DDIMInversion.execute(model, latent, schedule(model, steps), empty, scheme, **options).result
        return psnr(vae.decode(reconstruct(model, trajectory)), target, 1.0)

    twenty, fifty = quality("next", 20), quality("next", 50)
    assert fifty >= 38
    assert fifty > twenty
    predicted = quality("predicted", 20)
    assert predicted > fifty and predicted >= 45
    assert quality("fixed_point", 20) > predicted


def test_divergence_on_few_steps_falls_back_and_is_logged(mini, scene, caplog):
    """Three steps from pure noise are too large to contract everywhere; the result is never worse than `next`."""
    model = scene.model
    latent = {"samples": model.model.process_latent_out(scene.content[1].latents[0]) * 6}  # far outside the data
    sigmas = schedule(model, 2)
    with caplog.at_level(logging.WARNING):
        _, solved, *_ = DDIMInversion.execute(model, latent, sigmas, scene.empty, "fixed_point", 8).result
    _, plain, *_ = DDIMInversion.execute(model, latent, sigmas, scene.empty, "next").result
    errors = [(reconstruct(model, t) - latent["samples"]).norm() for t in (solved, plain)]
    assert errors[0] <= errors[1]
