from dataclasses import replace

import pytest
import torch
from pastiche.nodes.algorithms.views import attention_map, heat_overlay, mark_cell, pca_image
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.host.features.views import feature_pca, features_at, style_similarity
from pastiche.nodes.sockets import FeatureKey
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule


@pytest.fixture(scope="module")
def banks():
    model = tiny_unet()

    def bank(memory, seed, size):
        latent = {"samples": random_latent(*size, seed=seed)}
        _, trajectory = invert(model, latent, schedule(model, 3), tiny_cond(model), "next")
        return capture(model, trajectory, "self_attention, residual", "7", memory, "full")

    return {memory: bank(memory, 0, (8, 12)) for memory in ("ram", "recompute")} | {"style": bank("ram", 1, (10, 8))}


def test_three_known_factors_come_back_as_three_channels():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 400, generator=generator) * torch.tensor([[9.0], [3.0], [1.0]])
    mixing = torch.linalg.qr(torch.randn(8, 3, generator=generator))[0]
    image = pca_image((mixing @ factors).view(1, 8, 20, 20)).view(400, 3).T
    for channel, factor in zip(image, factors):
        # the clamped ends of a percentile scale are not linear: compare where both are inside
        inside = (channel > 0) & (channel < 1)
        assert torch.corrcoef(torch.stack([channel[inside], factor[inside]]))[0, 1].abs() > 0.98


def test_attention_map_is_explicit_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
    expected = sum(torch.softmax(k[:, h * 4 : h * 4 + 4] @ q[h * 4 : h * 4 + 4] / 2, 0) for h in range(2)) / 2
    assert torch.allclose(attention_map(q, k, 2), expected, atol=1e-6)


def test_a_recomputed_bank_gives_the_same_features(banks):
    key = FeatureKey("residual", "output", 7)
    for share in (0.0, 0.5, 1.0):
        assert torch.allclose(features_at(banks["ram"], key, share), features_at(banks["recompute"], key, share), atol=1e-5)


def test_pictures_have_the_images_proportions(banks):
    image = feature_pca(banks["ram"], banks["recompute"], "7", 0.5, 64)
    assert image.shape[0] == 2 and image.shape[2] / image.shape[1] == pytest.approx(12 / 8, abs=0.3)
    assert torch.allclose(image[0], image[1], atol=1e-3)
    picture = style_similarity(banks["recompute"], banks["style"], "7", 0.5, 1.0, 1.0, torch.rand(1, 64, 96, 3), torch.rand(1, 80, 64, 3))
    assert picture.shape == (1, 64, 96 + 51, 3) and 0 <= float(picture.min()) and float(picture.max()) <= 1


def test_overlay_and_mark_stay_inside():
    assert heat_overlay(torch.zeros(16, 16, 3), torch.rand(4, 4)).shape == (16, 16, 3)
    for row, column in ((0, 0), (3, 3)):
        marked = mark_cell(torch.zeros(16, 16, 3), row, column, (4, 4))
        assert marked.sum() > 0 and marked.shape == (16, 16, 3)


def test_layers_that_were_not_captured_get_a_sentence(banks):
    with pytest.raises(ValueError, match='hold no residual or self_attention.*of "8"; they hold'):
        feature_pca(banks["ram"], None, "8", 0.5, 64)
    with pytest.raises(ValueError, match="one layer"):
        feature_pca(banks["ram"], None, "6-7", 0.5, 64)
    with pytest.raises(ValueError, match="compare: its features"):
        feature_pca(banks["ram"], banks["style"], "7", 0.5, 64)


class StepStore:
    """Features that are their step's number everywhere, or `values` at every step."""

    nbytes = 0

    def __init__(self, shape, values=None):
        self.shape, self.values = shape, values

    def read(self, key, step, device):
        return torch.full(self.shape, float(step)) if self.values is None else self.values


@pytest.mark.parametrize("share, step", [(0.0, 4), (0.24, 4), (0.25, 3), (0.5, 2), (0.99, 1), (1.0, 1)])
def test_percent_runs_from_the_noisiest_step_to_the_cleanest(banks, share, step):
    """Steps count up with the noise: percent 0 is the last one of a trajectory of 4."""
    trajectory = replace(banks["ram"].trajectory, sigmas=torch.arange(5.0), latents=torch.zeros(5, 1, 4, 8, 12))
    key = FeatureKey("residual", "output", 7)
    bank = replace(banks["ram"], trajectory=trajectory, store=StepStore((1, 2, 4, 6)))
    assert features_at(bank, key, share).unique().tolist() == [step]


def test_the_marked_patch_is_the_one_asked_for(banks):
    """x counts columns, y rows, on a grid that is not square: the mark, and the query whose attention is drawn."""
    bank = banks["ram"]
    rows, columns, width = 4, 6, 32  # the grid of output 7 for an 8x12 latent
    hidden = torch.zeros(1, rows * columns, width)
    hidden[0, 1 * columns + 4] = 30 * torch.randn(width, generator=torch.Generator().manual_seed(0))
    content = replace(bank, store=StepStore(None, hidden))
    black, style_image = torch.zeros(1, 64, 96, 3), torch.full((1, 80, 64, 3), 0.5)

    def draw(x, y):
        return style_similarity(content, banks["style"], "7", 0.5, x, y, black, style_image)[0]

    here = draw(4.5 / columns, 1.5 / rows)
    marked = here[:, :96, 0] > 0.5
    ys, xs = marked.nonzero().unbind(1)
    assert (int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())) == (16 - 1, 32, 64 - 1, 80)
    flat = draw(1.5 / columns, 1.5 / rows)  # a query of zeros attends evenly; its mirror image would be (4.5, 1.5)
    assert float(flat[:, 96:].std(dim=(0, 1)).max()) < 1e-3 < float(here[:, 96:].std(dim=(0, 1)).max())
