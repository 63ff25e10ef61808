"""Decoding and choosing on hand-made prototypes, where every mask is known in advance."""

import math

import pytest
import torch

from pastiche.nodes.algorithms.overlay import draw_overlay, label_map, paint_layers, tint
from pastiche.nodes.algorithms.segments import (
    PointMap,
    Segments,
    coarse_masks,
    contains,
    crop_objects,
    decode_segments,
    rank,
    points_without_object,
    rank_by_similarity,
    render_masks,
    select_boxes,
    select_points,
)

SIZE, GRID = 64, 16


def rectangles(*boxes, scores=None) -> Segments:
    """Objects that fill x1, y1, x2, y2 (multiples of 4, of a 64 px image) exactly, largest first."""
    prototypes = torch.full((len(boxes), GRID, GRID), -1.0)
    for plane, (x1, y1, x2, y2) in zip(prototypes, boxes):
        plane[y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = 1.0
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    areas = (edges[:, 2:] - edges[:, :2]).prod(1)
    assert areas.tolist() == sorted(areas.tolist(), reverse=True)
    scores = torch.tensor(scores or [0.9] * len(boxes))
    return Segments(SIZE, SIZE, edges, scores, areas, torch.eye(len(boxes)), prototypes, (GRID, GRID))


WHOLE, PART, OTHER = (0, 0, 32, 32), (8, 8, 20, 20), (40, 40, 52, 48)


def test_render_and_contains_agree_everywhere():
    segments = rectangles(WHOLE, PART, OTHER)
    masks = render_masks(segments)
    for mask, (x1, y1, x2, y2) in zip(masks, (WHOLE, PART, OTHER)):
        expected = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        expected[y1:y2, x1:x2] = True
        assert (mask & ~expected).sum() == 0 and mask.sum() > 0.7 * expected.sum()
    pixels = [(x, y) for y in range(SIZE) for x in range(SIZE)]
    assert torch.equal(contains(segments, pixels).T.reshape(SIZE, SIZE, 3).permute(2, 0, 1), masks)


def test_points_outside_the_image_hold_nothing():
    assert not contains(rectangles(WHOLE), [(-1, 5), (64, 5), (5, -0.1), (5, 64)]).any()


def test_point_takes_best_smallest_largest_all():
    segments = rectangles(WHOLE, PART, scores=[0.6, 0.9])
    inside_both = [(14, 14)]
    assert select_points(segments, inside_both, among="best") == ([1], [])
    assert select_points(segments, inside_both, among="smallest") == ([1], [])
    assert select_points(segments, inside_both, among="largest") == ([0], [])
    assert select_points(segments, inside_both, among="all") == ([0, 1], [])
    with pytest.raises(ValueError, match="biggest"):
        select_points(segments, inside_both, among="biggest")


@pytest.mark.parametrize("scores", [[0.6, 0.9, 0.3], [0.5, 0.5, 0.5]])
@pytest.mark.parametrize("among", ["best", "smallest", "largest"])
def test_point_map_is_what_a_point_would_take(among, scores):
    segments = rectangles(WHOLE, PART, OTHER, scores=scores)
    found = PointMap(segments, among)
    for number in range(3):
        found.add(number, render_masks(segments, [number])[0])
    for x, y in [(4, 4), (14, 14), (44, 44), (60, 4)]:
        taken, _ = select_points(segments, [(x, y)], among=among)
        assert int(found.objects[y, x]) == (taken[0] + 1 if taken else 0)


def test_points_on_nothing_are_named():
    segments = rectangles(WHOLE, OTHER)
    assert points_without_object(segments, [(4, 4), (60, 4), (44, 44), (-3, 5)]) == [(60, 4), (-3, 5)]
    assert points_without_object(segments, []) == []
    assert points_without_object(rectangles(), [(4, 4)]) == [(4, 4)]


def test_several_points_take_several_objects():
    assert select_points(rectangles(WHOLE, PART, OTHER), [(44, 44), (4, 4)]) == ([2, 0], [])


def test_negative_point_passes_an_object_over():
    segments = rectangles(WHOLE, PART, scores=[0.9, 0.6])
    # best would be the whole; the negative point lies in the whole but outside the part
    assert select_points(segments, [(14, 14)], [(4, 4)]) == ([1], [])


def test_negative_point_cuts_a_part_out():
    segments = rectangles(WHOLE, PART)
    assert select_points(segments, [(4, 4)], [(14, 14)]) == ([0], [1])


def test_negative_wins_where_nothing_separates():
    assert select_points(rectangles(WHOLE), [(4, 4)], [(28, 28)]) == ([], [])


def test_negative_points_alone_keep_the_rest():
    assert select_points(rectangles(WHOLE, OTHER), [], [(4, 4)]) == ([1], [0])


def test_negative_points_beside_claimed_objects():
    segments = rectangles(WHOLE, PART, OTHER)
    assert select_points(segments, [], [(14, 14)], claimed=[0]) == ([0], [1])
    assert select_points(segments, [], [(28, 28)], claimed=[0, 2]) == ([2], [])
    assert select_points(segments, [(44, 44)], [(14, 14)], claimed=[0]) == ([0, 2], [1])
    assert select_points(segments, [], [(14, 14)], claimed=[]) == ([], [0, 1])


def test_boxes_take_the_best_filled_object():
    segments = rectangles(WHOLE, PART, OTHER)
    assert select_boxes(segments, [(0, 0, 33, 31), (7, 9, 21, 20), (38, 38, 60, 60)]) == [0, 1, 2]
    assert select_boxes(segments, [(56, 0, 64, 20)]) == []
    assert select_boxes(rectangles(), [(0, 0, 9, 9)]) == []


def test_ranks():
    segments = rectangles(WHOLE, PART, OTHER, scores=[0.5, 0.7, 0.9])
    assert rank(segments, "largest", 2) == [0, 1]
    assert rank(segments, "confident", 2) == [2, 1]
    assert rank(segments, "central", 3) == [2, 0, 1]
    with pytest.raises(ValueError, match="oldest"):
        rank(segments, "oldest", 1)


def prediction_of(boxes, scores, coefficients):
    """The network's (5 + C, A) for x1, y1, x2, y2 in network pixels."""
    edges = torch.tensor(boxes, dtype=torch.float32)
    centre, size = (edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]
    return torch.cat([centre, size, torch.tensor(scores)[:, None], torch.as_tensor(coefficients, dtype=torch.float32)], 1).T


def test_decode_suppresses_scales_and_sorts():
    prototypes = torch.full((2, GRID, GRID), -1.0)
    prototypes[0, 0:8, 0:8] = 1.0
    prototypes[1, 8:16, 8:12] = 1.0
    boxes = [(32, 32, 48, 64), (0, 0, 32, 32), (0, 0, 32, 31), (0, 0, 32, 32)]
    prediction = prediction_of(boxes, [0.9, 0.8, 0.7, 0.3], [[0, 1], [1, 0], [1, 0], [0, 1]])
    # a 128 x 128 image shown to the network at 64 x 64
    found = decode_segments(prediction, prototypes, 128, 128, (GRID, GRID), confidence=0.4, overlap=0.7)
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 64, 64], [64, 64, 96, 128]]))
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.9]))
    torch.testing.assert_close(found.areas, torch.tensor([64.0 * 64, 32 * 64]))
    assert len(decode_segments(prediction, prototypes, 128, 128, (GRID, GRID), confidence=0.95)) == 0


def test_boxes_grow_with_each_side_of_the_image():
    """8 x 12 network pixels become 40 x 90: 5 down, 7.5 across for each."""
    prediction = torch.tensor([[6.0, 4.0, 4.0, 4.0, 0.9, 1.0]]).T
    found = decode_segments(prediction, torch.ones(1, 8, 8), 40, 90, (4.0, 6.0), 2)
    assert found.boxes.tolist() == [[30.0, 10.0, 60.0, 30.0]]
    assert found.areas.tolist() == [600.0]  # of cells of 10 x 15 pixels


def test_boxes_that_overlap_by_less_stay():
    """Boxes of IoU 1/3 whose masks are apart."""
    prototypes = torch.full((2, GRID, GRID), -1.0)
    prototypes[0, 0:8, 0:4] = 1.0
    prototypes[1, 0:8, 8:12] = 1.0
    prediction = prediction_of([(0, 0, 32, 32), (16, 0, 48, 32)], [0.9, 0.8], [[1, 0], [0, 1]])
    counts = [len(decode_segments(prediction, prototypes, 64, 64, (GRID, GRID), overlap=overlap)) for overlap in (0.3, 0.35)]
    assert counts == [1, 2]


def test_an_object_of_one_cell_is_an_object_and_one_of_none_is_not():
    prototypes = torch.full((2, GRID, GRID), -1.0)
    prototypes[0, 4, 4] = 1.0
    prediction = prediction_of([(0, 0, 32, 32), (40, 40, 60, 60)], [0.9, 0.8], [[1, 0], [0, 1]])
    assert decode_segments(prediction, prototypes, 64, 64, (GRID, GRID)).areas.tolist() == [16.0]


def test_decode_drops_the_same_mask_in_another_box():
    prototypes = torch.full((1, GRID, GRID), -1.0)
    prototypes[0, 2:8, 2:8] = 1.0
    prediction = prediction_of([(8, 8, 32, 32), (0, 0, 60, 60)], [0.9, 0.8], [[1], [1]])
    assert len(decode_segments(prediction, prototypes, 64, 64, (GRID, GRID), overlap=0.7)) == 1


def test_padding_is_no_part_of_the_image():
    prototypes = torch.ones(1, GRID, GRID)
    prediction = prediction_of([(0, 0, 64, 64)], [0.9], [[1]])
    found = decode_segments(prediction, prototypes, 30, 60, (GRID / 2, GRID))  # the lower half is padding
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 60, 30]]))
    assert coarse_masks(found)[0, 8:].sum() == 0
    assert render_masks(found).all() and found.areas.item() == 30 * 60


def test_rank_by_similarity_is_cosine():
    images = torch.tensor([[3.0, 0.0], [0.0, 0.1], [5.0, 5.0]])
    texts = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert rank_by_similarity(images, texts, 1) == [1, 2]
    assert rank_by_similarity(images, texts, 2) == [1, 2, 0]
    with pytest.raises(ValueError, match="2 numbers"):
        rank_by_similarity(images, torch.ones(1, 3), 1)


def test_crop_is_the_object_on_the_fill():
    image = torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[0, 10:18, 20:28] = True
    mask[0, 10, 20] = False
    fill = torch.tensor([0.25, 0.5, 0.75])
    crop = crop_objects(image, mask, 8, fill)[0]
    torch.testing.assert_close(crop[1:, 1:], image[11:18, 21:28], rtol=0, atol=1e-5)
    torch.testing.assert_close(crop[0, 0], fill, rtol=0, atol=1e-5)
    wide = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    wide[0, 30:34, 8:40] = True
    square = crop_objects(image, wide, 32, fill)[0]
    torch.testing.assert_close(square[:14], fill.expand(14, 32, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(square[14:18], image[30:34, 8:40], rtol=0, atol=1e-5)
    upright = crop_objects(image.transpose(0, 1), wide.transpose(1, 2), 32, fill)[0]
    torch.testing.assert_close(upright, square.transpose(0, 1), rtol=0, atol=1e-5)


def test_layers_and_overlay():
    segments = rectangles(WHOLE, PART, OTHER)
    masks = render_masks(segments)
    layers = paint_layers(iter(masks), SIZE, SIZE)
    assert layers.labels[28, 4] == 1 and layers.labels[14, 14] == 2 and layers.labels[60, 60] == 0
    assert all(masks[i][y, x] for i, (x, y) in enumerate(layers.anchors))
    flat = label_map(layers)
    assert flat[60, 60].sum() == 0 and len(flat.reshape(-1, 3).unique(dim=0)) == 4
    image = torch.full((SIZE, SIZE, 3), 0.5)
    final = masks[2].float()
    overlay = draw_overlay(image, layers, final)
    assert overlay.shape == image.shape and 0 <= overlay.min() and overlay.max() <= 1
    torch.testing.assert_close(overlay[60, 10], torch.full((3,), 0.25))  # outside everything: dimmed
    assert (tint(final)[..., 3] > 0).equal(masks[2])
    empty = paint_layers(iter(()), SIZE, SIZE)
    assert torch.equal(draw_overlay(image, empty, torch.ones(SIZE, SIZE)), image)


def test_crescent_keeps_its_number_on_itself():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    crescent = ((x - 32).hypot(y - 32) < 28) & ((x - 42).hypot(y - 32) > 24)
    (x0, y0), *_ = paint_layers([crescent], 64, 64).anchors
    assert crescent[y0, x0] and math.isfinite(x0)


def one_by_one(segments, positive, negative, among):
    """What `select_points` says, point after point."""
    held, vetoed = contains(segments, positive).tolist(), contains(segments, negative).any(1).tolist()
    preference = {"best": segments.scores, "smallest": -segments.areas, "largest": segments.areas, "all": segments.scores}[among].tolist()
    chosen = []
    for point in range(len(positive)):
        pool = [number for number in range(len(segments)) if held[number][point] and not vetoed[number]]
        pool = pool if among == "all" else sorted(pool, key=lambda number: -preference[number])[:1]
        chosen += [number for number in pool if number not in chosen]
    return chosen


@pytest.mark.parametrize("among", ["best", "smallest", "largest", "all"])
def test_many_points_at_once_take_what_each_would(among):
    segments = rectangles(WHOLE, PART, OTHER, (4, 4, 12, 12), scores=[0.6, 0.9, 0.3, 0.95])
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3, 40):
        points = [tuple(point) for point in (64 * torch.rand(count, 2, generator=generator)).tolist()]
        negative = [(46.0, 44.0)]
        assert select_points(segments, points, negative, among)[0] == one_by_one(segments, points, negative, among)


def test_a_hundred_thousand_points_are_looked_at_together(monkeypatch):
    """One call of each operation on all points, none for each."""
    calls, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *args, **kwargs: (calls.append(0), argmax(*args, **kwargs))[1])
    points = [(float(number % 64), float(number // 64 % 64)) for number in range(100_000)]
    assert sorted(select_points(rectangles(WHOLE, PART, OTHER), points, among="smallest")[0]) == [0, 1, 2]
    assert len(calls) == 1
