"""Every accepted way of writing points and boxes, and the refusals."""

import json

import pytest
import torch

from pastiche.nodes.algorithms.prompts import Boxes, parse_boxes, parse_points


@pytest.mark.parametrize(
    "text, positive, negative",
    [
        ("", (), ()),
        ("  \n", (), ()),
        ("[]", (), ()),
        ('[{"x": 1, "y": 2}, {"x": 3.5, "y": 4}]', ((1, 2), (3.5, 4)), ()),
        ('[{"x": 1, "y": 2, "label": 0}, {"x": 3, "y": 4, "label": 1}]', ((3, 4),), ((1, 2),)),
        ('[{"x": 1, "y": 2, "label": "negative"}]', (), ((1, 2),)),
        ("[[1, 2], [3, 4]]", ((1, 2), (3, 4)), ()),
        ("[[1, 2, 1], [3, 4, 0]]", ((1, 2),), ((3, 4),)),
        ("[5, 6]", ((5, 6),), ()),
        ('{"x": 5, "y": 6}', ((5, 6),), ()),
        ('{"positive": [{"x": 1, "y": 2}], "negative": [[3, 4]]}', ((1, 2),), ((3, 4),)),
        ('{"negative": [[3, 4]]}', (), ((3, 4),)),
        ("[[[1, 2], [5, 6]], [[3, 4]]]", ((1, 2), (5, 6)), ((3, 4),)),
        ('[[{"x": 1, "y": 2}], []]', ((1, 2),), ()),
        ('{"points": [[1, 2], [3, 4]], "labels": [1, 0]}', ((1, 2),), ((3, 4),)),
    ],
)
def test_point_formats(text, positive, negative):
    points = parse_points(text)
    assert (points.positive, points.negative) == (positive, negative)


def test_points_of_a_negative_list():
    assert parse_points('[{"x": 1, "y": 2}]', default_label=0).negative == ((1, 2),)


def test_size_scales_to_the_image():
    points = parse_points('{"positive": [[10, 20]], "negative": [[0, 40]], "size": [100, 50]}').on(200, 200)
    assert points.positive == ((20, 80),) and points.negative == ((0, 160),)
    assert parse_points("[[10, 20]]").on(200, 200).positive == ((10, 20),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[1, 2]", "no valid JSON"),
        ('"hello"', "list of points"),
        ("[[1]]", "no point"),
        ('[{"x": 1}]', "no point"),
        ('[{"x": "a", "y": 1}]', "finite"),
        ("[[NaN, 1]]", "finite"),
        ("[[1e308, 1]]", "finite number, or lies beyond"),
        ("[[" + "9" * 400 + ", 1]]", "finite"),
        ("[[" + "9" * 5000 + ", 1]]", "no valid JSON"),
        ("[" * 3000 + "]" * 3000, "no valid JSON"),
        (str([[1, 2]] * 100_001), "100001 points are more than the 100000"),
        ('{"positives": []}', "positive"),
        ('{"points": [[1, 2]], "labels": [1, 0]}', "same length"),
        ('{"positive": [[1, 2]], "size": [0, 5]}', "size"),
        ('{"positive": [[1, 2]], "size": [1e-308, 5]}', "size"),
    ],
)
def test_bad_points(text, message):
    with pytest.raises(ValueError, match=message):
        parse_points(text)


@pytest.mark.parametrize(
    "value, boxes",
    [
        (None, ()),
        ("", ()),
        ("[]", ()),
        ('[{"x": 1, "y": 2, "width": 3, "height": 4}]', ((1, 2, 4, 6),)),
        ({"x": 1, "y": 2, "width": 3, "height": 4}, ((1, 2, 4, 6),)),
        ([{"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "score": 0.9}], ((1, 2, 4, 6),)),
        ("[[1, 2, 4, 6], [0, 0, 9, 9]]", ((1, 2, 4, 6), (0, 0, 9, 9))),
        ("[4, 6, 1, 2]", ((1, 2, 4, 6),)),
        ([(1, 2, 4, 6)], ((1, 2, 4, 6),)),
        (torch.tensor([[1, 2, 4, 6]]), ((1, 2, 4, 6),)),
        ('[{"x1": 1, "y1": 2, "x2": 4, "y2": 6}]', ((1, 2, 4, 6),)),
        ('[{"startX": 4, "startY": 2, "endX": 1, "endY": 6}]', ((1, 2, 4, 6),)),
        ('{"boxes": [[1, 2, 4, 6]], "size": [10, 10]}', ((1, 2, 4, 6),)),
    ],
)
def test_box_formats(value, boxes):
    assert parse_boxes(value).on(10, 10) == boxes


def test_boxes_for_each_image():
    box = {"x": 1, "y": 2, "width": 3, "height": 4}
    boxes = parse_boxes([[box], [], [box, box]])
    assert [len(boxes.on(8, 8, image)) for image in range(4)] == [1, 0, 2, 2]
    assert parse_boxes(json.dumps([[[1, 2, 3, 4]], []])).on(8, 8, 1) == ()


def test_box_size_scales():
    assert parse_boxes('{"boxes": [[1, 2, 4, 6]], "size": [10, 20]}').on(20, 20) == ((2, 2, 8, 6),)


@pytest.mark.parametrize(
    "value, message",
    [("{", "no valid JSON"), ("[[1, 2, 3]]", "no box"), ([{"x": 1}], "no box"), ("[[1, 2, 1, 5]]", "no area"), ("7", "list of boxes")],
)
def test_bad_boxes(value, message):
    with pytest.raises(ValueError, match=message):
        parse_boxes(value)


def test_boxes_scale_with_each_side_of_their_image():
    boxes = Boxes((((1.0, 2.0, 3.0, 4.0),), ()), (10.0, 20.0))
    assert boxes.on(30, 100) == ((3.0, 10.0, 9.0, 20.0),) and boxes.on(30, 100, image=1) == boxes.on(30, 100, image=7) == ()
