"""Load FastSAM and FastSAM Prompt as ComfyUI runs them, on the demo model and drawn scenes."""

import json
import os

import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import io
from PIL import Image

from pastiche.nodes.fastsam import FastSAMPrompt, LoadFastSAM
from pastiche.nodes.host.fastsam import model as fastsam
from pastiche.nodes.host.fastsam.checkpoint import read_checkpoint
from pastiche.nodes.host.fastsam.preview import _numbers
from support import segmenters

segmenters.require_ultralytics()
drawing = segmenters.scenes()


@pytest.fixture(scope="module")
def model():
    (loaded,) = LoadFastSAM.execute(fastsam.MINI).args
    return loaded


@pytest.fixture(scope="module")
def scene():
    return drawing.draw_scene(drawing.HELD_OUT + 7, 300, 400, (3, 4))


@pytest.fixture(scope="module")
def image(scene):
    return torch.from_numpy(scene.image)[None]


def iou(mask, truth):
    truth = torch.as_tensor(truth)
    mask = mask > 0.5
    return ((mask & truth).sum() / (mask | truth).sum()).item()


def test_demo_weights_are_small_and_go_through_the_ordinary_reader(model, tmp_path, monkeypatch):
    assert os.path.getsize(fastsam.MINI_FILE) < 8_000_000
    assert fastsam.MINI in fastsam.list_fastsam()
    # the same file under models/fastsam is the same network
    (tmp_path / "copy.safetensors").write_bytes(fastsam.MINI_FILE.read_bytes())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "fastsam", ([str(tmp_path)], set(fastsam.EXTENSIONS)))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (copy,) = LoadFastSAM.execute("copy.safetensors").args
    picture = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(copy.network(picture), model.network(picture)))


def test_demo_weights_as_an_ultralytics_checkpoint(model, image, tmp_path, monkeypatch):
    """Saved as FastSAM's authors save theirs, the network loads from .pt and finds the same."""
    weights = read_checkpoint(str(fastsam.MINI_FILE))
    network = segmenters.random_network(width=weights.width)
    network.load_state_dict(weights.state)
    segmenters.save_checkpoint(tmp_path / "FastSAM-s.pt", network, train_args={"imgsz": 256})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "fastsam", ([str(tmp_path)], set(fastsam.EXTENSIONS)))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (again,) = LoadFastSAM.execute("FastSAM-s.pt").args
    ours, theirs = model.segment(image[0]), again.segment(image[0])
    torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=0.5)


def test_everything_finds_the_objects(model, image, scene):
    masks, overlay, labels, boxes = FastSAMPrompt.execute(model, image, merge=False).args
    best = [max(iou(mask, truth) for mask in masks) for truth in scene.masks]
    assert sum(value > 0.7 for value in best) >= 0.8 * len(best), best
    assert overlay.shape == labels.shape == image.shape and len(boxes) == 1 and len(boxes[0]) == len(masks)


def test_point_box_and_negative(model, image, scene):
    (x, y), (u, v) = (drawing.inner_point(mask) for mask in scene.masks[:2])
    (point, *_) = FastSAMPrompt.execute(model, image, points=json.dumps([{"x": x, "y": y}])).args
    assert iou(point[0], scene.masks[0]) > 0.7
    (box, *_) = FastSAMPrompt.execute(model, image, boxes=json.dumps([scene.boxes()[1].tolist()])).args
    assert iou(box[0], scene.masks[1]) > 0.7
    (both, *_) = FastSAMPrompt.execute(model, image, points=json.dumps([[x, y], [u, v]])).args
    assert iou(both[0], scene.masks[0] | scene.masks[1]) > 0.7
    (kept, *_) = FastSAMPrompt.execute(model, image, points=json.dumps({"positive": [[x, y]], "negative": [[u, v]]})).args
    assert iou(kept[0], scene.masks[0]) > 0.7 and kept[0][v, u] == 0
    (rest, *_) = FastSAMPrompt.execute(model, image, points=json.dumps([[x, y, 0]])).args
    assert rest[0][y, x] == 0 and rest[0][v, u] == 1


def test_sam3_formats_and_its_own_boxes_fit_again(model, image, scene):
    x, y = drawing.inner_point(scene.masks[0])
    coords = json.dumps([{"x": x, "y": y}])
    (mask, _, _, boxes) = FastSAMPrompt.execute(model, image, positive_coords=coords, negative_coords="[]").args
    assert iou(mask[0], scene.masks[0]) > 0.7
    (again, *_) = FastSAMPrompt.execute(model, image, bboxes=boxes).args
    assert torch.equal(again, mask)
    x1, y1, x2, y2 = scene.boxes()[0].tolist()
    for bboxes in ({"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}, [(x1, y1, x2, y2)]):
        assert iou(FastSAMPrompt.execute(model, image, bboxes=bboxes).args[0][0], scene.masks[0]) > 0.7


def test_batch_equals_single_images(model, scene, image):
    other = torch.from_numpy(drawing.draw_scene(drawing.HELD_OUT + 8, 300, 400).image)[None]
    together = FastSAMPrompt.execute(model, torch.cat([image, other])).args
    for number, single in enumerate((image, other)):
        alone = FastSAMPrompt.execute(model, single).args
        for part in range(3):
            assert torch.equal(together[part][number], alone[part][0])


def test_another_prompt_does_not_run_the_network(model, image):
    FastSAMPrompt.execute(model, image)
    calls = []
    hook = model.network.patcher.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        FastSAMPrompt.execute(model, image, points="[[10, 10]]", grow=2, confidence=0.3)
        assert not calls
        FastSAMPrompt.execute(model, image, resolution=128)
        assert len(calls) == 1
    finally:
        hook.remove()


def test_answer_to_the_picker(model, image):
    answer = FastSAMPrompt.execute(model, image)
    (shown,) = answer.ui["pastiche_fastsam"]
    assert (shown["width"], shown["height"]) == (400, 300) and shown["objects"] >= 1
    for part in ("image", "mask", "map"):
        folder = os.path.join(folder_paths.get_temp_directory(), shown[part]["subfolder"])
        assert shown[part]["type"] == "temp" and os.path.isfile(os.path.join(folder, shown[part]["filename"]))
    json.dumps(answer.ui)


def test_map_and_missed_points_reach_the_picker(model, image):
    answer = FastSAMPrompt.execute(model, image)
    (shown,) = answer.ui["pastiche_fastsam"]
    path = os.path.join(folder_paths.get_temp_directory(), shown["map"]["subfolder"], shown["map"]["filename"])
    red, green, _ = np.moveaxis(np.asarray(Image.open(path).convert("RGB")).astype(int), -1, 0)
    numbers = red + 256 * green
    assert numbers.shape == (300, 400) and set(np.unique(numbers)) <= set(range(shown["objects"] + 1))
    inside = np.argwhere(numbers == numbers.max())
    y, x = inside[len(inside) // 2]
    empty_y, empty_x = np.argwhere(numbers == 0)[0]
    points = json.dumps([[int(x), int(y)], [int(empty_x), int(empty_y)]])
    (shown,) = FastSAMPrompt.execute(model, image, points=points).ui["pastiche_fastsam"]
    assert shown["missed"] == [(empty_x, empty_y)]


def test_every_object_number_survives_the_map():
    numbers = torch.arange(300).view(3, 100)
    written = (255 * _numbers(numbers)).to(torch.uint8).long()  # as ComfyUI writes a picture
    assert torch.equal(written[..., 0] + 256 * written[..., 1], numbers)
    assert _numbers(torch.zeros(3000, 100)).shape[0] <= 1024


@pytest.mark.parametrize("points, boxes, text", [("[[1", "", "no valid JSON"), ("", "[[1, 2]]", "no box"), ("", "[[1, 1, 1, 9]]", "no area")])
def test_bad_json_is_told_before_anything_runs(points, boxes, text):
    with pytest.raises(ValueError, match=text):
        FastSAMPrompt.validate_inputs(points=points, boxes=boxes)


def test_good_json_is_valid():
    assert FastSAMPrompt.validate_inputs(points="[[1, 2]]", boxes=None) is True


@pytest.mark.parametrize("node", [LoadFastSAM, FastSAMPrompt])
def test_schema(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id.startswith("Pastiche") and schema.category.startswith("pastiche/")
    assert all(part.tooltip for part in [*schema.inputs, *schema.outputs])
    assert issubclass(node, io.ComfyNode)


def test_frozen_ids():
    inputs = [part.id for part in FastSAMPrompt.GET_SCHEMA().inputs]
    assert inputs[:6] == ["fastsam", "image", "points", "boxes", "mode", "text"]
    outputs = [part.get_io_type() for part in FastSAMPrompt.GET_SCHEMA().outputs]
    assert outputs[:2] == ["MASK", "IMAGE"]
