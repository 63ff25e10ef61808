"""The equations of Style Reference, against closed forms."""

import math

import pytest
import torch
from pastiche.nodes.algorithms.references import (
    RotaryLayout,
    differing_span,
    fit_latent,
    grown_tokens,
    match_channels,
    match_pairs,
    mix_styles,
    rotary_pairs,
    rotate_pairs,
    sampling_progress,
    scale_pairs,
    scheduled,
    share_tokens,
    shift_angles,
    token_grid,
    untwist_scales,
    within_padding,
)

LAYOUT = RotaryLayout((4, 6, 6), (100.0, 100.0, 100.0), True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles_at(layout, position):
    """Angle of every pair at an integer position (one number an axis), from the definition of RoPE."""
    return torch.tensor([
        place * theta ** (-2 * pair / channels)
        for place, theta, channels in zip(position, layout.thetas, layout.axes) for pair in range(channels // 2)
    ])


@pytest.mark.parametrize("schedule, values", [("constant", (0.75, 0.75, 0.75)), ("linear", (0.75, 0.5625, 0.375)), ("cosine", (0.75, 0.5625, 0.375)),
                                              ("sqrt", (0.75, 0.75 - 0.375 * math.sqrt(0.5), 0.375))])
def test_schedules(schedule, values):
    for progress, value in zip((0.0, 0.5, 1.0), values):
        assert scheduled(0.75, 0.375, progress, schedule) == pytest.approx(value, abs=1e-12)


def test_cosine_schedule_at_a_quarter():
    assert scheduled(1.0, 0.0, 0.25, "cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_progress_counts_steps():
    sigmas = [14.0, 3.0, 1.0, 0.5, 0.0]
    assert [sampling_progress(sigma, sigmas) for sigma in sigmas[:4]] == [0, 1 / 3, 2 / 3, 1]
    assert sampling_progress(3.01, sigmas) == 1 / 3
    assert sampling_progress(1.0, [1.0, 0.0]) == 0


@pytest.mark.parametrize("axis", [1, 2])
def test_span_of_differing_tokens(axis):
    a = random(9, 8) if axis == 1 else random(2, 9, 4)
    b = a.clone()
    b.movedim(axis - 1, 0)[3] += 1
    b.movedim(axis - 1, 0)[6] += 1
    assert differing_span(a, b, axis) == (3, 7)
    assert differing_span(a, a * (1 + 1e-3), axis) is None


def test_padding_inside_a_joint_span():
    assert within_padding((32, 64), {32: (0, 24)}) == (32, 56)
    assert within_padding((7, 31), {24: (0, 24)}) == (7, 31)
    assert within_padding((7, 31), {}) == (7, 31)


@pytest.mark.parametrize("tokens, shape, grid", [
    (24, (8, 12), (1, 4, 6)), (96, (8, 12), (1, 8, 12)), (20, (7, 9), (1, 4, 5)), (48, (2, 8, 12), (2, 4, 6)), (25, (8, 12), None),
])
def test_grids(tokens, shape, grid):
    assert token_grid(tokens, shape) == grid


def test_latents_are_cut_and_mirrored_never_resampled():
    row = torch.arange(5.0).view(1, 1, 1, 5)
    assert fit_latent(row, (1, 3)).flatten().tolist() == [1, 2, 3]
    assert fit_latent(row, (1, 9)).flatten().tolist() == [1, 0, 0, 1, 2, 3, 4, 4, 3]
    still = random(1, 2, 1, 3, 3)
    film = fit_latent(still, (4, 3, 3))
    assert film.shape == (1, 2, 4, 3, 3) and torch.equal(film, still.expand_as(film))


@pytest.mark.parametrize("axis", [1, 2])
def test_join_adds_and_replace_exchanges(axis):
    own, reference = random(1, 6, 6, 4), random(1, *((3, 6) if axis == 1 else (6, 3)), 4, seed=1)
    joined = share_tokens(own, reference, (2, 5), "join", axis)
    assert torch.equal(joined.narrow(axis, 0, 6), own) and torch.equal(joined.narrow(axis, 6, 3), reference)
    replaced = share_tokens(own, reference, (2, 5), "replace", axis)
    assert torch.equal(replaced.narrow(axis, 2, 3), reference)
    assert torch.equal(replaced.narrow(axis, 0, 2), own.narrow(axis, 0, 2)) and torch.equal(replaced.narrow(axis, 5, 1), own.narrow(axis, 5, 1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_pairs_go_there_and_back(interleaved):
    x = random(2, 3, 16)
    pairs = rotary_pairs(x, interleaved)
    partner = 1 if interleaved else 8
    assert torch.equal(pairs[..., 0, 0], x[..., 0]) and torch.equal(pairs[..., 0, 1], x[..., partner])
    assert torch.allclose(rotate_pairs(x, torch.zeros(8), interleaved), x, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotations_add_and_scaling_commutes(interleaved):
    x, scales = random(2, 3, 16).float(), untwist_scales(LAYOUT, 0.5, 1.5, 1.0)
    a, b = angles_at(LAYOUT, (1, 2, 3)), angles_at(LAYOUT, (0, 1, 5))
    once = rotate_pairs(rotate_pairs(x, a, interleaved), b, interleaved)
    assert torch.allclose(once, rotate_pairs(x, a + b, interleaved), atol=1e-5)
    left = scale_pairs(rotate_pairs(x, a, interleaved), scales, interleaved)
    assert torch.allclose(left, rotate_pairs(scale_pairs(x, scales, interleaved), a, interleaved), atol=1e-5)


def test_a_shifted_key_is_the_key_of_the_shifted_position():
    key = random(16).float()
    there = rotate_pairs(key, angles_at(LAYOUT, (0, 2, 3 + 7)), True)
    moved = rotate_pairs(rotate_pairs(key, angles_at(LAYOUT, (0, 2, 3)), True), shift_angles(LAYOUT, 7), True)
    assert torch.allclose(there, moved, atol=1e-5)


def test_untwisting_goes_from_high_to_low_along_each_direction():
    scales = untwist_scales(LAYOUT, 0.5, 1.5, 2.0)
    assert torch.allclose(scales, torch.tensor([1.5, 1.5, 0.5, 0.75, 1.5, 0.5, 0.75, 1.5]))


def test_matched_pairs_have_the_references_lengths_and_the_own_directions():
    x, reference = random(1, 2, 9, 16).float(), 3 * random(1, 2, 9, 16, seed=1).float()
    out = match_pairs(x, reference, 2, True)
    length = lambda tensor: rotary_pairs(tensor, True).square().sum(-1).mean(2).sqrt()
    assert torch.allclose(length(out), length(reference), rtol=1e-5)
    a, b = rotary_pairs(out, True), rotary_pairs(x, True)
    assert torch.allclose(a[..., 0] * b[..., 1], a[..., 1] * b[..., 0], atol=1e-4)
    turned = match_pairs(rotate_pairs(x, angles_at(LAYOUT, (1, 2, 3)), True), reference, 2, True)
    assert torch.allclose(turned, rotate_pairs(out, angles_at(LAYOUT, (1, 2, 3)), True), atol=1e-4)


def test_matched_channels_have_the_references_statistics():
    x, reference = random(1, 9, 8), 3 * random(1, 12, 8, seed=1) + 1
    out = match_channels(x, reference, 1).double()
    assert torch.allclose(out.mean(1), reference.mean(1), atol=1e-5)
    assert torch.allclose(out.std(1, correction=0), reference.std(1, correction=0), atol=1e-5)


def test_mixing():
    plain, a, b = random(1, 3), random(1, 3, seed=1), random(1, 3, seed=2)
    assert torch.equal(mix_styles(plain, [a, b], [0.0, 0.0]), plain)
    assert torch.allclose(mix_styles(plain, [a, b], [0.25, 0.5]), 0.25 * plain + 0.25 * a + 0.5 * b)
    assert torch.allclose(mix_styles(None, [a, b], [0.3, 0.7]), 0.3 * a + 0.7 * b)
    assert torch.equal(mix_styles(None, [a], [1.0]), a)


@pytest.mark.parametrize("tokens, small, shape, expected", [
    (64, (8, 8), (16, 12), 192), (16, (8, 8), (16, 12), 48), (20, (7, 9), (13, 15), 56), (48, (3, 8, 8), (3, 16, 8), 96),
    (15, (8, 8), (16, 16), None),
])
def test_tokens_grow_with_the_latent(tokens, small, shape, expected):
    """Patches of 1 and 2 cells, sides rounded up; three frames."""
    assert grown_tokens(tokens, small, shape) == expected
