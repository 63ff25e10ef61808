"""Pictures of features: colours and frames, pixel by pixel."""

import numpy as np
import pytest
import torch
from pastiche.nodes.algorithms.views import attention_map, heat_overlay, mark_cell, pca_image


def test_attention_map_is_the_mean_of_the_heads_softmax():
    query = torch.tensor([1.0, 0.0, 0.0, 2.0])
    keys = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) / 2**0.5
    torch.testing.assert_close(attention_map(query, keys, 2), torch.softmax(logits, -1).mean(0))


@pytest.mark.parametrize("heat, colour", [(0.0, (0.0, 0.0, 1.0)), (0.5, (0.5, 1.0, 0.4)), (1.0, (1.0, 0.0, 0.0))])
def test_heat_goes_from_blue_to_red_over_the_picture(heat, colour):
    picture = heat_overlay(torch.full((4, 6, 3), 0.2), torch.full((2, 3), heat), opacity=0.75)
    torch.testing.assert_close(picture, (0.25 * 0.2 + 0.75 * torch.tensor(colour)).expand(4, 6, 3))


@pytest.mark.parametrize("row, column, inner", [(0, 0, (0, 8, 0, 4)), (1, 2, (8, 16, 8, 12)), (3, 5, (24, 32, 20, 24))])
def test_a_cell_is_framed_by_one_red_pixel_and_kept(row, column, inner):
    image = torch.rand(32, 24, 3, generator=torch.Generator().manual_seed(0))
    marked = mark_cell(image, row, column, (4, 6))
    top, bottom, left, right = inner
    expected = image.clone()
    expected[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = torch.tensor([1.0, 0.1, 0.1])
    expected[top:bottom, left:right] = image[top:bottom, left:right]
    assert torch.equal(marked, expected)


def test_a_frame_around_less_than_three_pixels_holds_three():
    marked = mark_cell(torch.zeros(16, 16, 3), 4, 4, (16, 16))
    red = torch.zeros(16, 16, dtype=torch.bool)
    red[3:8, 3:8] = True
    red[4:7, 4:7] = False
    assert torch.equal(marked[..., 0] == 1, red)


def test_frames_are_wider_in_large_pictures():
    marked = mark_cell(torch.zeros(512, 384, 3), 1, 1, (4, 4))
    assert (marked[..., 0] == 1).sum() == (128 + 6) * (96 + 6) - 128 * 96


def test_colours_are_numpys_principal_components_of_the_whole_batch():
    features = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 3, 2, 1, 0.5]).view(5, 1, 1)
    points = features.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    points = points - points.mean(0)
    axes = np.linalg.eigh(points.T @ points)[1].T[::-1][:3]
    axes = axes * np.sign([axis[np.abs(axis).argmax()] for axis in axes])[:, None]
    found = points @ axes.T
    low, high = np.quantile(found, 0.01, axis=0), np.quantile(found, 0.99, axis=0)
    expected = torch.from_numpy(((found - low) / (high - low)).clip(0, 1).reshape(2, 3, 4, 3))
    torch.testing.assert_close(pca_image(features).double(), expected, rtol=0, atol=1e-4)
    assert pca_image(features[:, :2]).shape == (2, 3, 4, 3)  # fewer channels than colours
