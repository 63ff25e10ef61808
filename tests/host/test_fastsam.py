"""FastSAM in ComfyUI: files, network input, cache, model management, ONNX, and prompts to masks."""

import os

import comfy.model_management
import folder_paths
import pytest
import torch

from pastiche.nodes.algorithms.prompts import parse_boxes, parse_points
from pastiche.nodes.host.fastsam import model as fastsam
from pastiche.nodes.host.fastsam import prompt as fastsam_prompt
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.fastsam.checkpoint import SegmenterWeights
from pastiche.nodes.host.fastsam.numbers import number_objects
from pastiche.nodes.host.fastsam.network import OnnxNetwork, TorchNetwork
from pastiche.nodes.host.fastsam.prompt import Finish, Prompt, prompt_masks
from support import segmenters


# ---- files ----


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """An empty models folder, and folder_paths as it was afterwards."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folder_paths.folder_names_and_paths.pop("fastsam", None)
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


def test_files_of_own_and_of_neighbours_folders(folders):
    own = put(folders / "fastsam" / "FastSAM-s.pt")
    put(folders / "fastsam" / "notes.txt")
    neighbour = put(folders / "ultralytics" / "segm" / "person_yolov8s-seg.pt")
    foreign = put(folders / "elsewhere" / "FastSAM-x.pt")
    folder_paths.folder_names_and_paths["ultralytics_segm"] = ([str(folders / "elsewhere")], {".pt"})
    fastsam.register_fastsam_folder()
    names = [name for name in fastsam.list_fastsam() if name != fastsam.MINI]
    assert sorted(names) == ["FastSAM-s.pt", "person_yolov8s-seg.pt", "ultralytics_segm/FastSAM-x.pt"]
    assert [fastsam.find_fastsam(name) for name in sorted(names)] == [own, neighbour, foreign]


@pytest.mark.parametrize("name", ["../secret.pt", "missing.pt", "ultralytics_segm/../../x.pt", "checkpoints/model.safetensors"])
def test_names_outside_the_folders(folders, name):
    put(folders.parent / "secret.pt")
    fastsam.register_fastsam_folder()
    with pytest.raises(ValueError, match="none of ComfyUI's folders.*FastSAM-s.pt"):
        fastsam.find_fastsam(name)


# ---- network input ----


@pytest.mark.parametrize(
    "image, resolution, fixed, inner, padded",
    [
        ((480, 640), 640, None, (480, 640), (480, 640)),
        ((300, 400), 256, None, (192, 256), (192, 256)),
        ((1000, 333), 256, None, (256, 85), (256, 96)),
        ((5, 1000), 256, None, (1, 256), (32, 256)),
        ((300, 400), 256, (64, 64), (48, 64), (64, 64)),
    ],
)
def test_network_size(image, resolution, fixed, inner, padded):
    assert fastsam._network_size(*image, resolution, fixed) == (inner, padded)
    picture = fastsam._letterbox(torch.rand(*image, 3), inner, padded)
    assert picture.shape == (1, 3, *padded)
    if padded[0] > inner[0]:
        torch.testing.assert_close(picture[:, :, inner[0] :], torch.full_like(picture[:, :, inner[0] :], 114 / 255))


def test_a_letterbox_is_the_picture_in_0_to_1_at_the_top_left():
    image = 3 * torch.rand(48, 64, 4) - 1
    picture = fastsam._letterbox(image, (48, 64), (64, 96))
    expected = torch.full((1, 3, 64, 96), 114 / 255)
    expected[0, :, :48, :64] = image[..., :3].permute(2, 0, 1).clamp(0, 1)
    torch.testing.assert_close(picture, expected)


# ---- cache and model management, on a real network with random weights ----


@pytest.fixture
def tiny():
    segmenters.require_ultralytics()
    weights = SegmenterWeights(0.33, 0.0625, 1024, 64, segmenters.random_network().state_dict())
    network = TorchNetwork(weights, "tiny")
    network.calls = 0

    def count(*_):
        network.calls += 1

    network.patcher.model.register_forward_hook(count)
    return FastSAM("tiny", network)


def test_prompt_settings_do_not_run_the_network_again(tiny):
    image = torch.rand(50, 70, 3)
    tiny.segment(image)
    tiny.segment(image, confidence=0.1)
    tiny.segment(image.clone(), overlap=0.3)
    assert tiny.network.calls == 1
    tiny.segment(image, resolution=96)
    tiny.segment(image + 1e-3)
    assert tiny.network.calls == 3
    tiny.segment(image)
    assert tiny.network.calls == 3


def test_cache_is_limited_and_drops_the_oldest(tiny, monkeypatch):
    images = torch.rand(4, 64, 64, 3)
    tiny.segment(images[0])
    monkeypatch.setattr(fastsam, "CACHED_BYTES", 2 * tiny._size())
    for image in images[1:]:
        tiny.segment(image)
    assert len(tiny._answers) == 2 and tiny.network.calls == 4
    tiny.segment(images[3])
    assert tiny.network.calls == 4
    tiny.segment(images[0])
    assert tiny.network.calls == 5


def test_cache_belongs_to_the_loaded_model_alone():
    assert not [name for name, value in vars(fastsam).items() if isinstance(value, (dict, list)) and not name.startswith("__")]
    assert "_answers" not in vars(FastSAM)


def test_network_is_managed_by_comfyui(tiny):
    tiny.segment(torch.rand(64, 64, 3))
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert tiny.network.patcher in loaded
    comfy.model_management.unload_all_models()
    assert tiny.network.patcher not in [entry.model for entry in comfy.model_management.current_loaded_models]
    tiny.segment(torch.rand(64, 64, 3))
    assert tiny.network.calls == 2


def test_cancel_stops_between_images(tiny):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            prompt_masks(tiny, torch.rand(2, 64, 64, 3), Prompt(), Finish())
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert tiny.network.calls == 0


# ---- ONNX ----


def export(path, model, size=64):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model.model[-1].export = True
    names = {"input_names": ["images"], "output_names": ["output0", "output1"]}
    torch.onnx.export(model.float().eval(), (torch.zeros(1, 3, size, size),), str(path), dynamo=False, **names)
    return str(path)


def test_onnx_computes_what_the_checkpoint_computes(tmp_path):
    segmenters.require_ultralytics()
    model = segmenters.random_network()
    for scores in model.model[-1].cv3:
        torch.nn.init.constant_(scores[-1].bias, 1.0)  # an object everywhere
    weights = SegmenterWeights(0.33, 0.0625, 1024, 64, {k: v.clone() for k, v in model.state_dict().items()})
    exported = OnnxNetwork(export(tmp_path / "FastSAM-tiny.onnx", model))
    assert exported.fixed_size == (64, 64) and exported.size == 64
    picture = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(exported(picture), TorchNetwork(weights, "tiny")(picture)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    found = FastSAM("onnx", exported).segment(torch.rand(40, 90, 3))  # 28 x 64 of its 64 x 64 pixels, a prototype cell for 4
    assert len(found) > 0 and found.span == (7.0, 16.0) and found.prototypes.shape == (32, 16, 16)
    assert found.boxes.amin() >= 0 and bool((found.boxes.amax(0) <= torch.tensor([90, 40, 90, 40])).all())


def test_onnx_of_something_else(tmp_path):
    segmenters.require_ultralytics()
    with pytest.raises(ValueError, match="80 classes; FastSAM has 1|116"):
        OnnxNetwork(export(tmp_path / "yolo.onnx", segmenters.random_network(classes=80)))
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="broken.onnx is no ONNX file"):
        OnnxNetwork(str(tmp_path / "broken.onnx"))


# ---- prompts to masks, on a network whose answer is drawn ----


class Drawn:
    """Answers each picture with the same rectangles of a 64 x 64 image, given as x1, y1, x2, y2 and a score."""

    size = 64
    fixed_size = None

    def __init__(self, *rectangles):
        self.rectangles = rectangles

    def __call__(self, picture):
        prototypes = torch.full((32, picture.shape[2] // 4, picture.shape[3] // 4), -9.0)
        columns = []
        for plane, (x1, y1, x2, y2, score) in zip(prototypes, self.rectangles):
            plane[y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = 9.0
            coefficients = [0.0] * 32
            coefficients[len(columns)] = 1.0
            columns.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, score, *coefficients])
        return torch.tensor(columns).reshape(-1, 37).T, prototypes


HOUSE, DOOR, TREE = (4, 4, 36, 36, 0.9), (12, 20, 20, 32, 0.8), (44, 8, 60, 40, 0.7)


@pytest.fixture
def drawn():
    return FastSAM("drawn", Drawn(HOUSE, DOOR, TREE))


def run(drawn, prompt=Prompt(), finish=Finish(), count=1, **settings):
    images = torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return prompt_masks(drawn, images, prompt, finish, **settings)


def covers(mask, rectangle):
    """Intersection over union with a rectangle."""
    x1, y1, x2, y2 = rectangle[:4]
    expected = torch.zeros_like(mask)
    expected[y1:y2, x1:x2] = 1
    return (torch.minimum(mask, expected).sum() / torch.maximum(mask, expected).sum()).item()


def test_nothing_given_is_everything(drawn):
    result = run(drawn, finish=Finish(merge=False))
    assert result.masks.shape == (3, 64, 64) and result.counts == [3] and result.found == [3]
    assert [covers(mask, r) > 0.9 for mask, r in zip(result.masks, (HOUSE, TREE, DOOR))] == [True] * 3
    assert result.overlay.shape == result.labels.shape == (1, 64, 64, 3)
    assert len(result.labels.reshape(-1, 3).unique(dim=0)) == 4
    merged = run(drawn)
    assert torch.equal(merged.masks[0], result.masks.amax(0))


def test_points_several_objects_and_a_batch(drawn):
    prompt = Prompt(points=(parse_points("[[8, 8], [50, 20]]"),))
    result = run(drawn, prompt, count=3)
    assert result.masks.shape == (3, 64, 64)
    assert torch.equal(result.masks[0], result.masks[2])
    separate = run(drawn, prompt, Finish(merge=False), count=2)
    assert separate.masks.shape == (4, 64, 64) and separate.counts == [2, 2]
    assert covers(separate.masks[0], HOUSE) > 0.9 and covers(separate.masks[1], TREE) > 0.9


def test_negative_point_cuts_the_door_out_of_the_house(drawn):
    prompt = Prompt(points=(parse_points('{"positive": [[8, 8]], "negative": [[16, 26]]}'),))
    mask = run(drawn, prompt).masks[0]
    assert mask[8, 8] == 1 and mask[26, 16] == 0 and covers(1 - mask, (0, 0, 64, 64)) < 1


def test_points_of_all_inputs_join_and_scale(drawn):
    points = (
        parse_points('{"positive": [[4, 4]], "size": [32, 32]}'),
        parse_points("[[50, 20]]"),
        parse_points("[[16, 26]]", default_label=0),
    )
    mask = run(drawn, Prompt(points=points)).masks[0]
    assert mask[8, 8] == 1 and mask[20, 50] == 1 and mask[26, 16] == 0


def test_boxes_shared_and_for_each_image(drawn):
    shared = run(drawn, Prompt(boxes=(parse_boxes("[[43, 7, 61, 41]]"),)), count=2)
    assert covers(shared.masks[0], TREE) > 0.9 and torch.equal(shared.masks[0], shared.masks[1])
    house = {"x": 4, "y": 4, "width": 32, "height": 32}
    each = run(drawn, Prompt(boxes=(parse_boxes([[house], []]),)), count=2)
    assert covers(each.masks[0], HOUSE) > 0.9 and each.masks[1].sum() == 0
    (found,), none = each.boxes
    assert none == [] and found["x"] == pytest.approx(4) and found["width"] == pytest.approx(32)


def test_boxes_with_negative_points_only_take_away(drawn):
    prompt = Prompt(boxes=(parse_boxes("[[4, 4, 36, 36]]"),), points=(parse_points("[[16, 26, 0]]"),))
    mask = run(drawn, prompt).masks[0]
    assert mask[8, 8] == 1 and mask[26, 16] == 0 and mask[20, 50] == 0


@pytest.mark.parametrize("mode, first", [("largest", HOUSE), ("most confident", HOUSE), ("most central", HOUSE)])
def test_ranks(drawn, mode, first):
    assert covers(run(drawn, Prompt(mode=mode)).masks[0], first) > 0.9
    assert run(drawn, Prompt(mode=mode, count=2), Finish(merge=False)).counts == [2]


def test_mode_restricts_to_its_prompt(drawn):
    both = {"points": (parse_points("[[8, 8]]"),), "boxes": (parse_boxes("[[44, 8, 60, 40]]"),)}
    assert covers(run(drawn, Prompt(**both, mode="points")).masks[0], HOUSE) > 0.9
    assert covers(run(drawn, Prompt(**both, mode="boxes")).masks[0], TREE) > 0.9
    joined = run(drawn, Prompt(**both)).masks[0]
    assert joined[8, 8] == 1 and joined[20, 50] == 1


@pytest.mark.parametrize("mode", ["points", "boxes", "text"])
def test_mode_without_its_prompt(drawn, mode):
    with pytest.raises(ValueError, match=f'mode is "{mode}", but none are given'):
        run(drawn, Prompt(mode=mode))


def test_text_without_a_clip(drawn):
    with pytest.raises(ValueError, match="connect clip_vision and clip.*clip_folder"):
        run(drawn, Prompt(phrases=("a tree",)))


def test_padding_of_the_network_input_is_no_part_of_the_image():
    """96 x 60 becomes 64 x 40 in a 64 x 64 input: a box of the picture's lower part lands there, not above it."""
    picture = Drawn((8, 24, 56, 40, 0.9))  # in the network's pixels, down to the picture's last row
    wide = FastSAM("wide", picture)
    segments = wide.segment(torch.rand(60, 96, 3, generator=torch.Generator().manual_seed(0)), resolution=64)
    mask = fastsam_prompt.render_masks(segments, [0])[0].float()
    assert mask.shape == (60, 96) and covers(mask, (12, 36, 84, 60)) > 0.9
    tall = FastSAM("tall", Drawn((24, 8, 40, 56, 0.9)))
    segments = tall.segment(torch.rand(96, 60, 3, generator=torch.Generator().manual_seed(0)), resolution=64)
    assert covers(fastsam_prompt.render_masks(segments, [0])[0].float(), (36, 12, 60, 84)) > 0.9


def test_nothing_found_is_an_empty_mask():
    result = run(FastSAM("drawn", Drawn()), count=2, finish=Finish(merge=False))
    assert result.masks.shape == (2, 64, 64) and result.masks.sum() == 0 and result.found == [0, 0]
    assert run(FastSAM("drawn", Drawn()), finish=Finish(invert=True)).masks.min() == 1


def test_finish_grows_feathers_and_inverts_last(drawn):
    prompt = Prompt(points=(parse_points("[[50, 20]]"),))
    plain = run(drawn, prompt).masks[0]
    assert set(plain.unique().tolist()) == {0.0, 1.0}
    assert run(drawn, prompt, Finish(grow=3)).masks[0].sum() > plain.sum() > run(drawn, prompt, Finish(grow=-3)).masks[0].sum()
    soft = run(drawn, prompt, Finish(feather=4)).masks[0]
    assert 0 < soft[20, 43] < 1
    assert torch.equal(run(drawn, prompt, Finish(feather=4, invert=True)).masks[0], 1 - soft)
    # a small object first grows to a disc of about 8 pixels, whose middle a Gaussian of deviation 2 leaves as it is;
    # softened first it would have been 0.47 in the middle, (2 * 0.84 - 1) ** 2, and stayed so
    small = run(FastSAM("small", Drawn((32, 32, 36, 36, 0.9))), finish=Finish(grow=6, feather=4)).masks[0]
    assert small[34, 34] > 0.95 and small[34, 60] == 0


def test_confidence_hides_objects(drawn):
    assert run(drawn, confidence=0.75).found == [2]


def test_images_of_other_sizes_and_with_alpha(drawn):
    result = prompt_masks(drawn, torch.rand(1, 32, 64, 4), Prompt(), Finish())
    assert result.masks.shape == (1, 32, 64) and result.overlay.shape == (1, 32, 64, 3)


def test_large_image_takes_little_memory():
    many = FastSAM("drawn", Drawn(*[(4 * i, 4 * j, 4 * i + 4, 4 * j + 4, 0.9) for i in range(0, 15, 3) for j in range(0, 15, 3)]))
    result = prompt_masks(many, torch.rand(1, 1500, 1500, 3), Prompt(points=(parse_points("[[30, 30]]"),)), Finish())
    assert result.found == [25] and result.masks.shape == (1, 1500, 1500)


# ---- numbers on the overlay ----


def test_numbers_lie_on_their_objects_and_stay_inside():
    picture = torch.full((90, 120, 3), 0.5)
    anchors = [(60, 45), None, (0, 0), (119, 89)]
    written = number_objects(picture, anchors)
    assert written.shape == picture.shape and torch.equal(picture, torch.full((90, 120, 3), 0.5))
    changed = (written != 0.5).any(-1)
    for x, y in ((60, 45), (0, 0), (119, 89)):
        assert changed[y, x]
    # as many plates as objects that are there, each with some white on black
    assert (written[changed] == 0).any() and written[changed].max() > 0.8
    rows, columns = changed[30:60, 40:80].nonzero().unbind(1)
    assert abs(rows.float().mean() + 30 - 45) < 1 and abs(columns.float().mean() + 40 - 60) < 1
    assert not changed[:, 20:40].any() and torch.equal(number_objects(picture, []), picture)
    assert number_objects(torch.zeros(4, 4, 3), [(2, 2)]).shape == (4, 4, 3)


def test_a_later_number_covers_an_earlier_one():
    picture = torch.full((60, 60, 3), 0.5)
    assert torch.equal(number_objects(picture, [(30, 30), (30, 30)]), number_objects(picture, [None, (30, 30)]))
