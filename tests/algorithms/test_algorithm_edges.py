"""Where the equations' limits lie: small norms, weights below one, first and last steps, one cell beyond."""

import json
import math

import pytest
import torch

from pastiche.nodes.algorithms.diffstyler import keep_outside, normalise_masks, override_or_blend
from pastiche.nodes.algorithms.injectfusion import gamma_schedule, injecting_steps, match_spread
from pastiche.nodes.algorithms.layers import parse_layers
from pastiche.nodes.algorithms.masks import boundary, grow_mask, resize_mask
from pastiche.nodes.algorithms.metrics import channel_correlation
from pastiche.nodes.algorithms.prompts import Boxes, parse_boxes, parse_points
from pastiche.nodes.algorithms.references import differing_span, match_channels, match_pairs, rotary_pairs, sampling_progress, token_grid
from pastiche.nodes.algorithms.segments import (
    Segments,
    contains,
    decode_segments,
    points_without_object,
    rank,
    render_masks,
    select_boxes,
    select_points,
)
from pastiche.nodes.algorithms.slerp import angle, lerp, masked_slerp, match_norm, slerp
from pastiche.nodes.algorithms.styleid import adain, masked_statistics
from pastiche.nodes.algorithms.training import random_crop
from pastiche.nodes.algorithms.views import heat_overlay


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_slerp_does_not_depend_on_the_size_of_either(scale):
    h, content = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    for ours, theirs in ((scale, 1.0), (1.0, scale)):
        found, expected = slerp(ours * h, theirs * content, 0.3), ours * slerp(h, content, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    turned = slerp(scale * h, content, 0.3)
    torch.testing.assert_close(angle(turned, scale * h), 0.3 * angle(h, content))


def test_slerp_of_nothing_is_nothing_turned():
    h, none = random(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(slerp(h, none, 0.5), h) and torch.equal(slerp(none, h, 0.5), none)
    assert torch.equal(match_norm(none, h), none)
    assert slerp(h, random(1, 3, 4, 4, seed=1), 0) is h and masked_slerp(h, h, 0, torch.ones(1, 1, 4, 4)) is h
    half = h.half()
    assert lerp(half, half, 0.5).dtype == torch.float16
    torch.testing.assert_close(lerp(h, 3 * h, 0.25), 1.5 * h)


def test_nearly_parallel_features_are_interpolated_on_the_straight_line():
    h = random(1, 3, 4, 4)
    across = random(1, 3, 4, 4, seed=1)
    across = across - (across * h).sum() / h.square().sum() * h
    for turn in (1e-6, 5e-5, 2e-4, 1e-2):
        content = math.cos(turn) * h + math.sin(turn) * across / across.norm() * h.norm()
        expected = math.cos(0.4 * turn) * h + math.sin(0.4 * turn) * across / across.norm() * h.norm()
        torch.testing.assert_close(slerp(h, content, 0.4), expected, rtol=0, atol=1e-8 * float(h.norm()))


def test_statistics_under_weights_below_one():
    """sum w (x - mean)^2 / (sum w - sum w^2 / sum w): half of every weight is the same mean, and 0.2 of one pixel is that pixel."""
    x = random(1, 2, 3, 4)
    mask = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
    mean, std = masked_statistics(x, mask)
    total = mask.sum()
    expected = (mask * x).sum((2, 3)) / total
    variance = (mask * (x - expected[..., None, None]) ** 2).sum((2, 3)) / (total - mask.square().sum() / total)
    torch.testing.assert_close(mean[..., 0, 0], expected)
    torch.testing.assert_close(std[..., 0, 0], variance.sqrt())
    single = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    single[..., 1, 2] = 0.2
    mean, std = masked_statistics(x, single)
    torch.testing.assert_close(mean[0, :, 0, 0], x[0, :, 1, 2])
    assert not std.any()


def test_a_flat_channel_takes_the_styles_mean_and_a_faint_one_its_deviation():
    style = random(1, 1, 8, 8)
    for deviation, flat in ((1e-7, True), (1e-3, False)):
        content = 5 + deviation * random(1, 1, 8, 8, seed=1)
        found = adain(content, style)
        assert float(found.std() / style.std()) == pytest.approx(0 if flat else 1, abs=1e-9)
        torch.testing.assert_close(found.mean(), style.mean())
    faint = adain(random(1, 1, 8, 8, seed=1), 1e-8 * style)  # an all but flat style flattens nothing it need not
    assert float(faint.std()) == pytest.approx(float(1e-8 * style.std()), rel=1e-9)


def test_masks_that_leave_nothing_to_the_base():
    masks = torch.tensor([0.3, 0.7 - 1e-8]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert not normalise_masks(masks)[1].any()
    assert normalise_masks(0.99 * masks)[1].flatten()[0] == pytest.approx(0.01, rel=1e-3)
    ours, content = random(1, 2), random(1, 2, seed=1)
    assert override_or_blend(ours, content, 1.0) is content
    torch.testing.assert_close(override_or_blend(ours, content, 0.25), 0.25 * content + 0.75 * ours)
    sample = torch.full((1, 1, 1, 3), float("nan"))
    assert keep_outside(sample, torch.ones(1, 1, 1, 3), torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 1, 3)).isnan().tolist() == [[[[False, False, True]]]]


def test_two_steps_are_first_and_last():
    assert [sampling_progress(sigma, [2.0, 1.0, 0.0]) for sigma in (2.0, 1.0)] == [0.0, 1.0]
    assert sampling_progress(1.0, [1.0, 0.0]) == sampling_progress(1.0, [1.0]) == 0.0
    assert gamma_schedule(0.3, 1, "increasing") == [0.3] and gamma_schedule(0.3, 2, "increasing") == pytest.approx([0.0, 0.6])
    assert gamma_schedule(0.8, 2, "decreasing") == pytest.approx([1.0, 0.6])


def test_the_steps_that_inject():
    sampled = [8.0, 4.0, 2.0, 1.0, 0.0]
    assert injecting_steps(sampled, sampled, 2.0) == [0, 1, 2]
    assert injecting_steps(sampled, sampled, 2.0 * (1 + 5e-6)) == [0, 1, 2]
    assert injecting_steps(sampled, sampled, 2.1) == [0, 1] and injecting_steps(sampled, sampled, 0.0) == [0, 1, 2, 3]
    assert injecting_steps(sampled, [7.0, 1.1], 0.5) == [0, 3] and injecting_steps(sampled, [5.0, 0.0], 0.0) == [1]
    assert injecting_steps(sampled, [0.1], 0.5) == []  # nothing captured there


def test_a_constant_source_keeps_its_place():
    flat = torch.full((1, 3, 4, 4), 2.0)
    assert torch.equal(match_spread(flat, random(1, 3, 4, 4).float()), flat)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_statistics_of_small_tokens_are_matched_too(scale):
    x, reference = scale * random(1, 12, 8), random(1, 9, 8, seed=1)
    out = match_channels(x, reference, 1)
    torch.testing.assert_close(out.std(1, correction=0), reference.std(1, correction=0), rtol=1e-3, atol=0)
    lengths = [rotary_pairs(each, True).square().sum(-1).mean(1).sqrt() for each in (match_pairs(x, reference, 1, True), reference)]
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=0)


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16, 32, 64])
def test_every_patch_size_is_found(patch):
    assert token_grid(15, (3 * patch, 5 * patch)) == (1, 3, 5) and token_grid(30, (2, 3 * patch, 5 * patch)) == (2, 3, 5)
    assert token_grid(15, (2 * patch + 1, 4 * patch + 1)) == (1, 3, 5)
    assert token_grid(15, (3 * 128, 5 * 128)) is None


def test_tokens_differ_from_one_percent_on():
    a = random(9, 8)
    for share, expected in ((0.004, None), (0.03, (2, 3))):
        b = a.clone()
        b[2] *= 1 + share
        assert differing_span(a, b, 1) == differing_span(b, a, 1) == expected


def test_endless_numbers():
    assert parse_layers("999") == [("output", 999)] and len(parse_layers("0-999")) == 1000
    with pytest.raises(ValueError, match="goes beyond 999"):
        parse_layers("1000")


@pytest.mark.parametrize("label, positive", [*((label, False) for label in (0, -1, "0", "-1", "-", "negative", "neg", "background", False)),
                                             *((label, True) for label in (1, 2, "1", "positive", True))])
def test_labels_of_points(label, positive):
    own = parse_points(json.dumps([{"x": 3, "y": 4, "label": label}]))
    beside = parse_points(json.dumps({"points": [[3, 4]], "labels": [label]}))
    assert (own.positive, own.negative) == (((3, 4),), ()) if positive else ((), ((3, 4),))
    if label is not False:
        assert (beside.positive, beside.negative) == (own.positive, own.negative)


def test_boxes_from_any_corner_and_their_edges():
    assert parse_boxes("[[5, 6, 1, 2]]").on(9, 9) == ((1, 2, 5, 6),)
    for text in ("[[1, 2, 1, 6]]", "[[1, 2, 5, 2]]", '[{"x": 1, "y": 2, "width": 0, "height": 3}]'):
        with pytest.raises(ValueError, match="has no area"):
            parse_boxes(text)
    assert Boxes().on(9, 9) == ()


@pytest.mark.parametrize("size, right", [([1, 1], True), ([1e9, 1e9], True), ([0.5, 9], False), ([9, 0], False), ([9], False), ([9, 9, 9], False), (["9", 9], False)])
def test_sizes_of_the_picture_that_was_picked_on(size, right):
    text = json.dumps({"positive": [[1, 1]], "size": size})
    if right:
        assert parse_points(text).on(2, 4).positive == ((2 / size[0], 4 / size[1]),)
        return
    with pytest.raises(ValueError, match='"size" must be'):
        parse_points(text)


def test_what_is_wrong_is_shown_in_80_characters():
    for count in (76, 77, 200):
        with pytest.raises(ValueError) as told:
            parse_points(json.dumps(["x" * count]))
        shown = str(told.value).split(": ", 1)[1].split(" is no point")[0]
        assert shown == json.dumps("x" * count) if count + 2 <= 80 else shown == ('"' + "x" * 76) + "..."


def cells(boxes, prototypes=None, size=8):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    scores = torch.linspace(0.9, 0.5, len(boxes))
    areas = ((boxes[:, 2:] - boxes[:, :2]).prod(1))
    return Segments(size, size, boxes, scores, areas, torch.ones(len(boxes), 1), torch.ones(1, size, size), (float(size), float(size)))


def predictions(*rows):
    """(centre x, centre y, width, height, score), one positive coefficient."""
    return torch.tensor([[*row, 1.0] for row in rows]).T


def test_objects_beside_the_picture_are_none():
    one = torch.ones(1, 8, 8)
    found = decode_segments(predictions((-4, 4, 6, 6, 0.9), (4, -4, 6, 6, 0.8), (12, 4, 6, 6, 0.7), (4, 4, 4, 4, 0.6)), one, 8, 8, (8, 8), 1.0)
    assert found.boxes.tolist() == [[2, 2, 6, 6]] and found.areas.tolist() == [16]
    cut = decode_segments(predictions((0, 0, 4, 4, 0.9), (8, 8, 6, 4, 0.8)), one, 8, 8, (8, 8), 1.0)
    assert sorted(cut.boxes.tolist()) == [[0, 0, 2, 2], [5, 6, 8, 8]]


def test_confidence_and_overlap_are_limits_that_are_passed():
    one, pair = torch.ones(1, 8, 8), ((2, 2, 4, 4, 0.9), (4, 2, 4, 4, 0.8))  # they share 8 of 24 cells
    count = lambda **settings: len(decode_segments(predictions(*pair), one, 8, 8, (8, 8), 1.0, **settings))
    assert count(overlap=0.34) == 2 and count(overlap=0.33) == 1
    assert count(confidence=0.79, overlap=0.9) == 2 and count(confidence=0.81, overlap=0.9) == 1
    assert count(confidence=0.8, overlap=0.9) == 1
    assert count(limit=1, overlap=0.9) == 1
    assert len(decode_segments(predictions(*pair)[:, :0], one, 8, 8, (8, 8), 1.0)) == 0


def test_pixels_on_an_objects_edges():
    segments = cells([[2, 3, 5, 6]])
    inside = {(x, y) for x in range(-1, 9) for y in range(-1, 9) if bool(contains(segments, [(float(x), float(y))])[0, 0])}
    assert inside == {(x, y) for x in (2, 3, 4) for y in (3, 4, 5)}
    whole = cells([[0, 0, 8, 8]])
    assert contains(whole, [(0.0, 0.0), (7.9, 7.9), (8.0, 4.0), (4.0, 8.0), (-0.1, 4.0)]).tolist() == [[True, True, False, False, False]]


def test_a_box_takes_what_fills_it_best_and_touching_is_no_overlap():
    segments = cells([[0, 0, 8, 8], [1, 1, 4, 4], [5, 5, 8, 8]])
    assert select_boxes(segments, [(1, 1, 4, 5)]) == [1] and select_boxes(segments, [(-9, -9, 99, 99)]) == [0]
    assert select_boxes(segments, [(5, 5, 8, 8), (4.5, 5, 8, 8)]) == [2]  # once
    assert select_boxes(cells([[1, 1, 4, 4]]), [(4, 1, 8, 4)]) == []
    assert select_boxes(cells([[1, 1, 4, 4]]), [(3.9, 1, 8, 4)]) == [0]


@pytest.mark.parametrize("box, fits, narrower", [
    ((0, 0, 4, 8), (0, 0, 4, 8), (1, 0, 4, 8)), ((0, 0, 8, 4), (0, 0, 8, 4), (0, 1, 8, 4)),
    ((-5, -5, 4, 8), (0, 0, 4, 8), (1, 0, 4, 8)), ((4, -5, 99, 99), (4, 0, 8, 8), (4, 0, 7, 8)), ((0, 4, 8, 99), (0, 4, 8, 8), (0, 4, 8, 7)),
])
def test_a_box_at_the_edge_takes_the_object_of_its_size(box, fits, narrower):
    assert select_boxes(cells([narrower, fits]), [box]) == [1] and select_boxes(cells([fits, narrower]), [box]) == [0]


def test_a_pixel_on_the_near_edge_is_inside_and_on_the_far_edge_outside():
    """Centres lie at halves."""
    segments = cells([[1.5, 2.5, 4.5, 6.5]])
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 1:4] = True
    assert torch.equal(render_masks(segments)[0], expected)
    points = [(float(x), float(y)) for y in range(8) for x in range(8)]
    assert torch.equal(contains(segments, points)[0].view(8, 8), expected)


def test_a_picture_without_objects():
    none = cells([[0, 0, 8, 8]]).take(torch.zeros(0, dtype=torch.long))
    assert select_boxes(none, [(0, 0, 8, 8)]) == [] == rank(none, "largest", 3)
    for among in ("best", "smallest", "largest", "all"):
        assert select_points(none, [(1.0, 1.0)], [(2.0, 2.0)], among) == ([], [])
    assert points_without_object(none, [(1.0, 1.0)]) == [(1.0, 1.0)]
    assert points_without_object(cells([[0, 0, 4, 4]]), []) == [] == points_without_object(none, [])
    assert points_without_object(cells([[0, 0, 4, 4]]), [(1.0, 1.0), (5.0, 1.0)]) == [(5.0, 1.0)]


def test_points_without_labels_are_positive():
    assert parse_points('{"points": [[1, 2], [3, 4]]}').positive == ((1, 2), (3, 4))
    with pytest.raises(ValueError, match="lists of the same length"):
        parse_points('{"points": [[1, 2]], "labels": [1, 0]}')


def test_ranks_count_from_the_best():
    segments = cells([[0, 0, 2, 2], [0, 0, 8, 3], [3, 3, 5, 6]])
    assert rank(segments, "largest", 2) == [1, 2] and rank(segments, "confident", 1) == [0]
    assert rank(segments, "central", 9) == [2, 1, 0]


def test_windows_of_a_crop():
    latents = torch.arange(40.0 * 24).view(1, 1, 40, 24)
    tops, lefts, sizes = set(), set(), set()
    for seed in range(300):
        found = random_crop(latents, 0.5, torch.Generator().manual_seed(seed))
        top, left = divmod(int(found[0, 0, 0, 0]), 24)
        h, w = found.shape[-2:]
        assert torch.equal(found, latents[..., top : top + h, left : left + w])
        sizes.add((h, w))
        if (h, w) == (24, 16):
            tops.add(top), lefts.add(left)
    assert sizes == {(16, 8), (24, 8), (24, 16), (32, 16)} and lefts == set(range(9)) and {0, 16} <= tops <= set(range(17))
    small = torch.zeros(1, 1, 5, 7)
    assert random_crop(small, 0.25, torch.Generator().manual_seed(0)).shape == small.shape


def test_contours_and_discs():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[:, 2:7, 2:7] = True
    line = boundary(mask)
    assert line.sum() == 16 and not line[:, 3:6, 3:6].any() and torch.equal(boundary(mask, 0), line)
    assert not boundary(torch.ones(1, 4, 4, dtype=torch.bool)).any()
    point = torch.zeros(1, 9, 11)
    point[:, 4, 5] = 0.7
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    for pixels in (1, 2, 3, 4, 20):
        disc = ((rows - 4) ** 2 + (columns - 5) ** 2 <= pixels**2)
        assert torch.equal(grow_mask(point, pixels)[0] > 0, disc) and grow_mask(point, pixels).max() == point.max()
    assert resize_mask(torch.ones(1, 5, 5), 1, 1).tolist() == [[[1.0]]]
    for size in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="both sides must be at least 1"):
            resize_mask(torch.ones(1, 5, 5), *size)


def test_heat_goes_from_blue_over_green_to_red():
    grey = torch.full((1, 1, 3), 0.5)
    colours = {0.0: (0, 0, 1), 0.25: (0, 0.5, 0.8), 0.5: (0.5, 1, 0.4), 0.75: (1, 0.5, 0), 1.0: (1, 0, 0)}
    for heat, colour in colours.items():
        torch.testing.assert_close(heat_overlay(grey, torch.tensor([[heat]]), 1.0)[0, 0], torch.tensor(colour, dtype=torch.float32))
        torch.testing.assert_close(heat_overlay(grey, torch.tensor([[heat]]))[0, 0], 0.35 * grey[0, 0] + 0.65 * torch.tensor(colour, dtype=torch.float32))


def test_correlation_of_faint_latents():
    a = 1e-3 * random(1, 2, 8, 8)
    assert channel_correlation(a, 1e-3 * a) == pytest.approx(1) and channel_correlation(a, torch.zeros_like(a)) == 0
