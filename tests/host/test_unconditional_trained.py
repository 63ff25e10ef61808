"""Whole runs on a small trained UNet2DModel: DDIMPipeline's images and inversion."""

import shutil

import folder_paths
import numpy as np
import pytest
import torch

from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.networks.unconditional import load_unconditional
from support.sampling import sample, schedule
from support.unconditional import SCHEDULER, TRAINED, blobs

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def name(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], ["folder"]))
    shutil.copytree(TRAINED, tmp_path / "blobs")
    return "blobs"


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_image_is_the_pipelines(name, clip):
    """50 steps of core's euler on the pipeline's own timesteps give DDIMPipeline's image.

    The pipeline starts from unit z at t = 980 (x = z / sqrt(alpha_bar)), walks "leading" timesteps 980..0 and ends
    at alpha_bar 1, which is sigma 0. Clipping: clip_denoised is the pipeline's clip_sample with
    use_clipped_model_output, for a sampler derives eps from the prediction it is given.
    """
    network = diffusers.UNet2DModel.from_pretrained(TRAINED).float()
    theirs = diffusers.DDIMScheduler.from_config({**SCHEDULER, "_class_name": "DDIMScheduler", "clip_sample": clip})
    theirs.set_timesteps(50)
    pipeline = diffusers.DDIMPipeline(network, theirs)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=50,
                        use_clipped_model_output=clip, output_type="np").images

    model, vae, conditioning = load_unconditional(name, clip_denoised=clip)
    sigmas = torch.cat([model.model.model_sampling.sigmas[theirs.timesteps], torch.zeros(1)])
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    image = vae.decode(sample(model, z * (1 + sigmas[0] ** 2).sqrt(), sigmas, conditioning))
    assert image.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.05


def test_inversion_round_trip(name):
    model, vae, _ = load_unconditional(name)
    image = blobs(2, torch.Generator().manual_seed(9)).movedim(1, -1) / 2 + 0.5
    latent = {"samples": vae.encode(image)}
    found = {}
    for scheme in ("next", "fixed_point"):
        _, trajectory = invert(model, latent, schedule(model, 20, "simple"), scheme=scheme)
        found[scheme] = psnr(vae.decode(reconstruct(model, trajectory)), image, 1.0)
    assert found["fixed_point"] >= 35 and found["fixed_point"] > found["next"] + 10
