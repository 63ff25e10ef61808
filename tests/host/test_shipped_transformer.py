"""The flow transformer that comes with the pack: it inverts photos, and Style Reference restyles them."""

import numpy as np
import pytest
import torch
from pastiche.nodes.host.networks.mini import TRANSFORMER_WEIGHTS, load_mini
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.settings import PRESETS
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.trajectories.midpoint_sampler import midpoint_sampler
from PIL import Image, ImageOps
from support.live import ROOT
from support.sampling import schedule

pytestmark = pytest.mark.skipif(not TRANSFORMER_WEIGHTS.is_file(), reason=f"the transformer's weights are not here: {TRANSFORMER_WEIGHTS.name}")


@pytest.fixture(scope="module")
def restyling():
    """(model, schedule, clean latent of a photo, of a painting, empty kind) of the pack's own file; neither picture was trained on."""
    model, vae, kinds = load_mini(architecture="transformer")
    photo, painting = (vae.encode(picture(f"{name}.{kind}")) for name, kind in (("content_coffee", "jpg"), ("style_impasto", "png")))
    return model, schedule(model, 20, "simple"), photo, painting, kinds["empty"]


def picture(name, size=96):
    """(1, size, size, 3) of a sample that comes with the pack, its middle."""
    image = ImageOps.fit(Image.open(ROOT / "assets" / "samples" / name).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy())[None].float() / 255


def test_the_shipped_transformer_brings_a_photo_back_in_twenty_steps(restyling):
    """By scheme midpoint and its sampler through core's loop, above 38 dB: in latents of deviation 1, whose decoder is nearly an isometry."""
    model, sigmas, photo, _, empty = restyling
    _, trajectory = invert(model, {"samples": photo}, sigmas, empty, "midpoint")
    clean, back = (model.model.process_latent_in(latent) for latent in (photo, reconstruct(model, trajectory, midpoint_sampler())))
    assert -10 * torch.log10((back - clean).square().mean() / (clean.max() - clean.min()) ** 2) > 38


def test_style_reference_brings_the_shipped_transformer_nearer_to_the_painting(restyling):
    """The channels' correlations in latents (Gram) of a photo drawn again beside a painting."""
    model, sigmas, photo, painting, empty = restyling
    _, content = invert(model, {"samples": photo}, sigmas, empty, "predicted")
    styled = style_reference(
        model, {"samples": painting}, None, content, share="replace", gamma=0.75, gamma_end=0.375, schedule="cosine", temperature=1.5, strength=1.0,
        layers="auto", start_percent=0.0, end_percent=1.0, cures=PRESETS["balanced"],
    )

    def gram(latent):
        return torch.einsum("bchw,bdhw->cd", *[model.model.process_latent_in(latent)] * 2) / latent[0, 0].numel()

    plain, changed = (reconstruct(patched, content) for patched in (model, styled))
    distances = [float((gram(latent) - gram(painting)).norm()) for latent in (plain, changed)]
    assert distances[1] < 0.8 * distances[0]
