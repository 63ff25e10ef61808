"""What holds a film still: rows of other frames, frames spread over it, motion, and the filter along it."""

import pytest
import torch

from pastiche.nodes.algorithms.frames import film_statistics, linked_rows, spread, warped_difference
from pastiche.nodes.algorithms.motion import motion, steadied


def moving(right, down, count=2, height=100, width=120, seed=0):
    """(F, H, W, 3): a picture frame over a smooth picture, so that coarse levels see something too."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 40, 44, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (240, 264), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    top, left = (60, 60)
    return torch.stack([picture[top + i * down :, left + i * right :][:height, :width] for i in range(count)])


def test_rows_are_of_the_first_and_the_previous_frame():
    own = torch.arange(12.0).view(3, 2, 2)
    both = linked_rows(own, None, None, True, True)
    assert both.shape == (3, 4, 2)
    for frame, (first, previous) in enumerate(((0, 0), (0, 0), (0, 1))):
        assert torch.equal(both[frame], torch.cat([own[first], own[previous]]))
    assert torch.equal(linked_rows(own, None, None, False, True), both[:, 2:])
    assert torch.equal(linked_rows(own, None, None, True, False), both[:, :2])
    assert linked_rows(own, None, None, False, False).shape == (3, 0, 2)


def test_a_chunk_with_what_the_ones_before_left_is_part_of_the_whole():
    own = torch.randn(7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = linked_rows(own, None, None, True, True)
    for at in range(1, 7):
        parts = [linked_rows(own[:at], None, None, True, True), linked_rows(own[at:], own[:1], own[at - 1 : at], True, True)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("count, most, expected", [(10, 2, [2, 7]), (3, 8, [0, 1, 2]), (1, 1, [0]), (500, 4, [62, 187, 312, 437]), (9, 3, [1, 4, 7])])
def test_frames_spread_over_a_film(count, most, expected):
    assert spread(count, most) == expected


def test_statistics_of_a_film_are_over_frames_and_positions():
    latents = torch.randn(4, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3 + 1
    mean, std = film_statistics(latents)
    flat = latents.movedim(1, 0).flatten(1)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert torch.allclose(mean.flatten(), flat.mean(1), atol=1e-12) and torch.allclose(std.flatten(), flat.std(1), atol=1e-12)


@pytest.mark.parametrize("right, down", [(3, 2), (-4, 1), (0, -5), (0, 0)])
def test_the_warped_difference_of_a_moving_crop_is_0_and_of_other_motion_is_not(right, down):
    frames = moving(right, down, 4)
    assert warped_difference(frames, right, down) == 0 == warped_difference(frames, right, down, 5)
    assert warped_difference(frames, right + 1, down) > 1e-3
    brighter = frames + torch.arange(4.0).view(4, 1, 1, 1) / 10
    assert warped_difference(brighter, right, down) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("right, down", [(3, 2), (-9, 4), (0, 0), (1, -7)])
def test_motion_is_found_wherever_the_frame_shows_what_was_there(right, down):
    before, now = moving(right, down)
    field = motion(before, now)
    inside = field[16:-16, 16:-16].reshape(-1, 2)
    assert (inside == torch.tensor([down, right])).all(1).float().mean() > 0.97


def test_steadying_follows_the_motion_and_leaves_what_is_new():
    before, now = moving(4, 3)
    noise = 0.2 * torch.randn(2, *now.shape, generator=torch.Generator().manual_seed(5))
    restyled, earlier = now + noise[0], before + noise[1]
    assert steadied(restyled, now, earlier, before, 0.0) is restyled
    out = steadied(restyled, now, earlier, before, 0.5)
    inner = (slice(20, -20), slice(20, -20))
    moved = earlier[3:, 4:]  # what was at (y + 3, x + 4) is at (y, x) now
    expected = (restyled[: len(moved), : moved.shape[1]] + moved) / 2
    assert (out[: len(moved), : moved.shape[1]] - expected)[inner].abs().median() < 1e-6
    other = moving(0, 0, 1, seed=8)[0]  # after a cut nothing of the frame before is in this one
    cut = steadied(restyled, other, earlier, before, 0.9)
    assert (cut - restyled).abs().mean() < 0.1 * noise[0].abs().mean()


def test_a_still_film_is_averaged_over_time():
    """y_t = (1 - s) x_t + s y_{t-1}: the filter's own closed form, on a film that stands still."""
    frame = moving(0, 0, 1)[0]
    restyled = torch.rand(4, *frame.shape, generator=torch.Generator().manual_seed(3))
    out = restyled[0]
    for t in range(1, 4):
        out = steadied(restyled[t], frame, out, frame, 0.6)
    expected = 0.6**3 * restyled[0] + 0.4 * sum(0.6 ** (3 - t) * restyled[t] for t in range(1, 4))
    assert torch.allclose(out, expected, rtol=0, atol=1e-6)
