"""Corners of the rooms: what runs beside what, notes about layers, queries on pictures, names and switches."""

import logging
import os
import types

import pytest
import torch

from pastiche.nodes.algorithms.views import attention_map, heat_overlay, mark_cell
from pastiche.nodes.host import files
from pastiche.nodes.host.compatibility import CompletedIO, _unknown
from pastiche.nodes.host.fastsam import model as models
from pastiche.nodes.host.fastsam.checkpoint import SegmenterWeights, _check_tensors, _culprit, _scale
from pastiche.nodes.host.fastsam.model import FastSAM, list_fastsam
from pastiche.nodes.host.fastsam.prompt import Finish, Prompt, _finish, choose
from pastiche.nodes.host.fastsam.text import CoreEncoder, choose_by_text, find_clip_folder
from pastiche.nodes.host.features.on_the_way import OnTheWay, Several
from pastiche.nodes.host.features.views import style_similarity
from pastiche.nodes.host.injections.beside import Beside, _has_its_own, obstacle
from pastiche.nodes.host.injections.injectfusion_sampler import _signature, _with
from pastiche.nodes.host.injections.style_marks import STYLE_INJECTION
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.host.networks.marks import injected_by, mark_injected, require_plain
from pastiche.nodes.host.networks.rotary import has_no_rotation, rotary_layout
from pastiche.nodes.host.networks.unconditional_layouts import recognise
from pastiche.nodes.host.training.adapters import Adapters
from pastiche.nodes.host.training.state import TrainingState, _exists
from pastiche.nodes.host.trajectories.inversion import _Notes, _refine, _witnessed
from pastiche.nodes.host.trajectories.report import _images
from pastiche.nodes.host.version import warn_if_too_old
from pastiche.nodes.sockets import FeatureBank, FeatureKey, Fingerprint, Trajectory
from support.models import tiny_unet


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(model, size, tensors):
    """A bank that holds `tensors` (by stream) of output 7 at every step."""
    trajectory = Trajectory(torch.tensor([0.0, 1.0]), random(2, 1, 4, *size), [[None, {}]], "next", Fingerprint("", ""))
    keys = {FeatureKey(stream, "output", 7): tensor for stream, tensor in tensors.items()}
    store = types.SimpleNamespace(read=lambda key, step, device: keys[key])
    return FeatureBank(trajectory, tuple(keys), "ram", store, model)


@pytest.mark.parametrize("projected", [False, True])
def test_attention_of_a_query_is_drawn_over_the_style(projected):
    """Hidden states go through the model's own projections, projected ones as they are; the hottest cell is red."""
    model = tiny_unet()
    adapter, slot = find_adapter(model), ("output", 7, 0)
    hidden, other = random(1, 24, 32), random(1, 40, 32, seed=1)
    weights = [adapter.projection_weight("attn1", slot, f"to_{name}") for name in "qk"]
    queries, keys = hidden[0] @ weights[0].T, other[0] @ weights[1].T
    content = bank_of(model, (8, 12), {"self_attention_q": queries[None]} if projected else {"self_attention": hidden})
    style = bank_of(model, (10, 16), {"self_attention_k": keys[None]} if projected else {"self_attention": other})
    picture, target = torch.rand(1, 40, 60, 3), torch.rand(1, 40, 64, 3)
    found = style_similarity(content, style, "7", 0.0, 0.99, 0.3, picture, target)[0]
    heat = attention_map(queries[1 * 6 + 5], keys, 2).view(5, 8)
    expected = torch.cat([mark_cell(picture[0], 1, 5, (4, 6)), heat_overlay(target[0], heat / heat.max())], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# rows beside the sample


def test_rows_have_their_own_conditions_no_more_and_no_less():
    place, value = slice(2, 4), random(1, 3, 5)
    batch = value.expand(4, 3, 5)
    fits = lambda conditions, **wanted: _has_its_own(conditions, place, wanted)
    assert fits({"c": batch}, c=(value, False)) and fits({"c": batch, "y": None}, c=(value, False), z=(None, False)) and fits({})
    assert not fits({"c": batch, "y": batch}, c=(value, False)) and not fits({}, c=(value, False))
    assert not fits({"c": batch[:3]}, c=(value, False))
    assert not fits({"c": batch}, c=(random(1, 3, 6), False)) and not fits({"c": batch}, c=(random(3, 5), False))
    assert not fits({"c": 5}, c=(value, False))
    longer = random(4, 6, 5)
    assert fits({"c": longer}, c=(value, True)) and not fits({"c": longer}, c=(value, False))
    assert not fits({"c": random(4, 7, 5)}, c=(value, True))
    assert not fits({"c": longer}, c=(random(1, 4, 5), True)) and fits({"c": random(4, 8)}, c=(random(1, 8), True))


def test_banks_keep_their_rows_and_the_sample_its_changes():
    kept = []
    readers = [types.SimpleNamespace(keep=lambda key, hidden, name=name: kept.append((name, key, hidden))) for name in "ab"]
    beside, hidden = Beside(2, ((readers[0], slice(2, 3)), (readers[1], slice(3, 5)))), random(5, 3, 2)
    beside.keep("key", hidden)
    assert [(name, key) for name, key, _ in kept] == [("a", "key"), ("b", "key")]
    assert torch.equal(kept[0][2], hidden[2:3]) and torch.equal(kept[1][2], hidden[3:5])
    changed = random(2, 3, 2, seed=1)
    assert torch.equal(beside.joined(changed, hidden), torch.cat([changed, hidden[2:]]))


def guider_of(model, **entry):
    options = {"transformer_options": {"wrappers": {}}}
    return types.SimpleNamespace(model_patcher=model, model_options=options, conds={"positive": [{"uuid": 1, **entry}]})


def test_what_stands_in_the_way_of_rows_beside():
    model, prompt = tiny_unet(), random(1, 7, 32)
    plain = model.clone()
    trajectory = lambda context: Trajectory(torch.tensor([0.0, 1.0]), random(2, 1, 4, 8, 8), [[context, {}]], "next", Fingerprint("", ""))
    assert obstacle(guider_of(model), plain, trajectory(prompt)) == "" == obstacle(guider_of(model), plain, trajectory(None))
    assert obstacle(guider_of(model), plain, trajectory(random(2, 7, 32))) == "its images have prompts of their own"
    for entry in ("control", "hooks", "gligen", "area"):
        assert obstacle(guider_of(model, **{entry: 1}), plain, trajectory(prompt)) == f"the sample's prompt has {entry}"
    assert obstacle(guider_of(model, control=None), plain, trajectory(prompt)) == ""
    marked = model.clone()
    mark_injected(marked, STYLE_INJECTION)
    assert obstacle(guider_of(marked), plain, trajectory(prompt)) == ""
    mark_injected(marked, "h-space Slerp")
    assert obstacle(guider_of(marked), plain, trajectory(prompt)) == "h-space Slerp is on the same model"
    for name in ("model_function_wrapper", "context_handler", "multigpu_clones"):
        changed = guider_of(model)
        changed.model_options[name] = object()
        assert obstacle(changed, plain, trajectory(prompt)).endswith("in its own way")
    changed = guider_of(model)
    changed.model_options["transformer_options"]["patches"] = {"attn2_patch": [lambda *args: args]}
    assert obstacle(changed, plain, trajectory(prompt)) == "another node changes the sampled model alone"


# notes


@pytest.mark.parametrize("count, names", [(1, "a"), (3, "a, b, c"), (4, "a, b, c, ...")])
def test_idle_layers_are_named_up_to_three(caplog, count, names):
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in "abcde"})
    adapters = Adapters(layers, "all", 1, 1.0, torch.Generator())
    for name in "abcde"[count:]:
        adapters.up[name].grad = torch.zeros(2, 1)
    with caplog.at_level(logging.INFO):
        adapters.report_idle()
    assert f"{count} of 5 layers take no part and learn nothing: {names}." in caplog.text
    caplog.clear()
    for name in "abcde":
        adapters.up[name].grad = torch.zeros(2, 1)
    with caplog.at_level(logging.INFO):
        adapters.report_idle()
    assert not caplog.text


def test_what_an_inversion_says_of_its_steps(caplog):
    landing = lambda residual, diverged: types.SimpleNamespace(residual=residual, diverged=diverged)
    notes = _Notes(1e-3)
    notes.take(landing(None, None), 1.0)
    notes.take(landing(torch.tensor([1e-3, 1e-4]), torch.tensor([False, False])), 2.0)
    with caplog.at_level(logging.INFO):
        notes.tell(3)
    assert not caplog.text
    notes.take(landing(torch.tensor([2e-3, 5e-3]), torch.tensor([False, True])), 3.0)
    notes.take(landing(torch.tensor([float("nan")]), torch.tensor([False])), 4.0)
    with caplog.at_level(logging.INFO):
        notes.tell(4)
    assert "diverged at 1 of 4 steps (first at sigma 3.000)" in caplog.text and "(1.0e-03) at 2 of 4 steps" in caplog.text


def test_substeps_lie_evenly_in_the_models_timestep():
    sampling = tiny_unet().get_model_object("model_sampling")
    ascending = torch.cat([torch.zeros(1), sampling.sigmas[[200, 600, 999]]])
    levels, keep = _refine(sampling, ascending, 4, torch.tensor(0.0))
    assert len(levels) == 13 and keep == [True] + [False, False, False, True] * 3
    assert torch.equal(levels[[0, 4, 8, 12]], ascending)
    steps = [float(sampling.timestep(level.view(1))) for level in levels[4:]]
    assert steps == pytest.approx([200, 300, 400, 500, 600, 700, 800, 899, 999], abs=1.5)
    assert _refine(sampling, ascending, 1, torch.tensor(0.0))[1] == [True] * 4
    from_first, kept = _refine(sampling, ascending, 2, sampling.sigmas[0])
    assert from_first[0] == sampling.sigmas[0] and sum(kept) == 4
    with pytest.raises(ValueError, match="^clean_level: the latent would count as one of sigma"):
        _refine(sampling, ascending, 1, 1.001 * ascending[1])
    _refine(sampling, ascending, 1, ascending[1])


def test_witnesses_hear_which_step_is_asked_about():
    heard = []
    witness = types.SimpleNamespace(at=heard.append)
    asked = _witnessed(lambda x, sigma: x, torch.tensor([0.0, 0.5, 2.0]), witness)
    assert [asked(value, torch.tensor(value)) for value in (2.0, 1.0, 0.5, 0.0)] == [2.0, 1.0, 0.5, 0.0] and heard == [2, 0, 1, 0]
    first, second = OnTheWay("", "", "ram", "half"), OnTheWay("", "", "ram", "half")
    first._missing, second._missing = dict.fromkeys([1, 2, 3]), dict.fromkeys([3, 4])
    both = Several([first, second])
    assert both.missing() == [1, 2, 3, 4]
    both.at(3)
    both.at(3)
    assert both.missing() == [1, 2, 4] and first._step == 3


def test_pictures_of_films_are_frames():
    assert _images(torch.zeros(2, 5, 8, 9, 4)).shape == (10, 8, 9, 3)
    assert _images(torch.zeros(2, 8, 9, 3, dtype=torch.float16)).dtype == torch.float32


# networks


def test_marks_and_fingerprints():
    model = tiny_unet()
    require_plain(model, "would")
    mark_injected(model, "A")
    mark_injected(model, "B")
    mark_injected(model, "A")
    assert injected_by(model) == ("A", "B", "A")
    with pytest.raises(ValueError, match="^model: it already carries A and B, which would. Connect the model from before A."):
        require_plain(model, "would")
    plain = fingerprint(model)
    assert len(plain.weights) == len(plain.patches) == 16
    for name, parameter in list(model.model.diffusion_model.named_parameters())[::40]:
        before = parameter.data.clone()
        parameter.data.view(-1)[0] += 1
        assert fingerprint(model).weights != plain.weights, name
        parameter.data = before
    assert fingerprint(model) == plain


def test_positions_of_networks_that_are_known():
    embed, video, none = (type(name, (torch.nn.Module,), {}) for name in ("EmbedND", "VideoRopePosition3DEmb", "Other"))
    found = embed()
    found.axes_dim, found.theta = [16, 56, 56], 10000
    layout = rotary_layout(torch.nn.Sequential(none(), found))
    assert layout.axes == (16, 56, 56) and layout.thetas == (10000.0,) * 3 and layout.interleaved and layout.width == 128
    found.axes_dim = [16, 56]
    assert rotary_layout(torch.nn.Sequential(none(), found)) is None
    moving = video()
    moving.dim_spatial_range, moving.dim_temporal_range = torch.arange(5), torch.arange(3)
    moving.t_ntk_factor, moving.h_ntk_factor, moving.w_ntk_factor = 1.0, 2.0, 3.0
    layout = rotary_layout(torch.nn.Sequential(moving))
    assert layout.axes == (6, 10, 10) and layout.thetas == (10000.0, 20000.0, 30000.0) and not layout.interleaved
    assert has_no_rotation(tiny_unet().model.diffusion_model) and not has_no_rotation(found)


def test_a_first_convolution_of_one_dimension_takes_no_channels():
    for shape, count in (((32,), 0), ((32, 4, 3, 3), 4), ((32, 3, 3), 3)):
        with pytest.raises(ValueError, match=f"^x takes {count} channels, expected 3"):
            recognise({"conv_in.weight": torch.zeros(shape), "up.0.weight": torch.zeros(1)}, "x")


def test_conditions_asked_for_and_options_copied():
    assert _signature([None, [{"uuid": 1}, {}], []]) == (None, (1, None), ())
    options = {"transformer_options": {"wrappers": {"kind": {"other": [1]}}, "a": 1}}
    for outermost, keys in ((True, ["pastiche_injectfusion", "other"]), (False, ["other", "pastiche_injectfusion"])):
        changed = _with(options, {"b": 2}, {"kind": "w"}, outermost)["transformer_options"]
        assert list(changed["wrappers"]["kind"]) == keys and changed["b"] == 2 and changed["a"] == 1
    assert options == {"transformer_options": {"wrappers": {"kind": {"other": [1]}}, "a": 1}}
    assert _with({}, {"b": 2})["transformer_options"] == {"b": 2, "wrappers": {}}


# FastSAM


def segments(count=0):
    from pastiche.nodes.algorithms.segments import Segments

    boxes = torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8]])[:count]
    prototypes = torch.zeros(2, 8, 8)
    return Segments(8, 8, boxes, torch.ones(count), torch.full((count,), 16.0), torch.eye(2)[:count], prototypes + 1, (8.0, 8.0))


def test_phrases_for_nothing_choose_nothing():
    encoder = types.SimpleNamespace(size=4, mean=(0.0, 0.0, 0.0))
    assert choose_by_text(segments(0), torch.zeros(8, 8, 3), ["a"], encoder, 1) == []


def test_modes_choose_their_own_prompts():
    everything = lambda **prompt: choose(segments(2), torch.zeros(8, 8, 3), 0, Prompt(**prompt))
    assert everything() == ([0, 1], []) == everything(mode="everything", phrases=("a",))
    assert everything(mode="largest", count=1) == ([0], [])
    for mode in ("points", "boxes", "text"):
        with pytest.raises(ValueError, match=f'^mode is "{mode}", but none are given'):
            everything(mode=mode)
    with pytest.raises(ValueError, match='^mode "x" is none of'):
        everything(mode="x")
    with pytest.raises(ValueError, match="^text needs a CLIP"):
        everything(phrases=("a",))


def test_masks_are_finished_in_order():
    masks = torch.zeros(2, 9, 9)
    masks[0, 4, 4] = masks[1, 0, 0] = 1
    assert _finish(masks, Finish()).shape == (1, 9, 9) and _finish(masks, Finish(merge=False)).shape == (2, 9, 9)
    grown = _finish(masks, Finish(merge=False, grow=1))
    assert grown.sum((1, 2)).tolist() == [5, 3]
    assert torch.equal(_finish(masks, Finish(merge=False, grow=1, invert=True)), 1 - grown)
    assert 0 < _finish(masks, Finish(feather=2.0))[0, 4, 6] < 1


def test_the_two_halves_of_a_clip(monkeypatch):
    sam, made = FastSAM("x", None), []
    assert sam.text_encoder() is None
    for half, missing in (("clip", "clip_vision"), ("clip_vision", "clip")):
        with pytest.raises(ValueError, match=f"^text needs both halves of a CLIP: {missing} is not connected"):
            sam.text_encoder(**{half: object()})
    vision = types.SimpleNamespace(image_size=224, image_mean=[0.1, 0.2, 0.3], encode_image=lambda images: {"image_embeds": images + 1})
    encoder = sam.text_encoder(vision, object())()
    assert isinstance(encoder, CoreEncoder) and encoder.size == 224 and encoder.mean == (0.1, 0.2, 0.3)
    assert torch.equal(encoder.embed_images(torch.zeros(1, 2)), torch.ones(1, 2))
    monkeypatch.setattr(models, "find_clip_folder", lambda name: name)
    monkeypatch.setattr(models, "FolderEncoder", lambda path: made.append(path) or path)
    assert [sam.text_encoder(folder=folder)() for folder in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert made == ["a", "b", "a"]


def test_models_of_other_packs_folders_are_listed_by_their_type(monkeypatch):
    import folder_paths

    names = {"fastsam": ["FastSAM-s.pt"], "ultralytics": ["a.PT", "b.onnx", "c.yaml", "d.safetensors"]}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {key: ([], set()) for key in names})
    monkeypatch.setattr(folder_paths, "get_filename_list", names.__getitem__)
    assert list_fastsam() == [models.MINI, "FastSAM-s.pt", "ultralytics/a.PT", "ultralytics/b.onnx", "ultralytics/d.safetensors"]
    paths = {"text_encoders": ["clip/model.safetensors", "model.safetensors", "t5/other.safetensors"], "clip_vision": ["clip/model.safetensors"]}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {key: ([], set()) for key in paths})
    monkeypatch.setattr(folder_paths, "get_filename_list", paths.__getitem__)
    monkeypatch.setattr(folder_paths, "get_full_path", lambda key, name: f"/{key}/{name}" if key == "clip_vision" else None)
    assert find_clip_folder("clip") == "/clip_vision/clip"
    with pytest.raises(ValueError, match="^clip_folder 't5' is not under"):
        find_clip_folder("t5")


def test_what_pytorch_says_of_a_pickle_is_cut_to_its_culprit():
    assert _culprit("first\n  GLOBAL os.system was not allowed\nmore") == "GLOBAL os.system was not allowed"
    assert _culprit("Unsupported operand 5") == "Unsupported operand 5" and _culprit(" plain ") == "plain"
    assert len(_culprit("GLOBAL " + "x" * 300)) == 200


def test_layouts_of_other_generations_of_ultralytics():
    own = SegmenterWeights(0.33, 0.5, 1024, 640, {}).layout()
    assert _scale(own, "x") == (0.33, 0.5, 1024.0)
    older = {key: own[key] for key in ("backbone", "head")} | {"depth_multiple": 1.0, "width_multiple": 1.25}
    assert _scale(older, "x") == (1.0, 1.25, float(1 << 16)) and _scale({**older, "max_channels": 512}, "x") == (1.0, 1.25, 512.0)
    counted = SegmenterWeights(0.33, 0.5, 1024, 640, {}).layout()
    counted["head"][-1][3][0] = 80  # the number of classes, where others write its name
    assert _scale(counted, "x") == (0.33, 0.5, 1024.0)
    for change in (dict(activation="relu"), dict(backbone=own["backbone"][:-1])):
        with pytest.raises(ValueError, match="^x is not laid out as YOLOv8-seg"):
            _scale({**own, **change}, "x")
    with pytest.raises(ValueError, match="^x does not describe"):
        _scale({**own, "scale": "missing"}, "x")


@pytest.mark.parametrize("change, message", [
    ({}, None), (dict(scores=torch.zeros(2, 4)), "has 2 classes"),
    (dict(coefficients=torch.zeros(31, 4)), "31 mask coefficients and 32"),
    (dict(prototypes=torch.zeros(33, 4)), "32 mask coefficients and 33"), (dict(scores=None), "lacks model.22.cv3"),
    (dict(prototypes=None), "has no mask head"),
    (dict(coefficients=None), "has no mask head"), (dict(prototypes=torch.full((32, 4), float("nan"))), "holds NaN"),
    (dict(prototypes=torch.zeros(32, 1).expand(32, 4)), "is a repeated tensor"),
])
def test_heads_of_a_segmenter(change, message):
    given = dict(scores=torch.zeros(1, 4), coefficients=torch.zeros(32, 4), prototypes=torch.zeros(32, 4)) | change
    names = dict(scores="model.22.cv3.0.2.weight", coefficients="model.22.cv4.0.2.weight", prototypes="model.22.proto.cv3.conv.weight")
    weights = SegmenterWeights(1, 1, 512, 640, {names[key]: tensor for key, tensor in given.items() if tensor is not None})
    if message is None:
        return _check_tensors(weights, "x")
    with pytest.raises(ValueError, match=f"^x.*{message}"):
        _check_tensors(weights, "x")


# files


def test_files_that_another_process_writes(tmp_path, monkeypatch):
    path = tmp_path / "pastiche-1-a.partial"
    path.write_bytes(b"x")
    about, now = 1_000_000, [0.0]
    os.utime(path, (about, about))
    monkeypatch.setattr(files.time, "time", lambda: about + now[0])
    locks = []
    monkeypatch.setattr(files, "_lock", lambda descriptor: locks.append(descriptor) or False)
    for age, abandoned, asked in ((59.0, False, 0), (60.0, False, 1), (61.0, False, 2), (86400.0, False, 3), (86401.0, True, 3)):
        now[0] = age
        assert files._abandoned(path) is abandoned and len(locks) == asked
    monkeypatch.setattr(files, "_lock", lambda descriptor: True)
    now[0] = 61.0
    assert files._abandoned(path) is True


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "a"
    with open(path, "wb") as first, open(path, "rb") as second:
        assert files._lock(first.fileno()) is True and files._lock(second.fileno()) is False


def test_states_that_are_not_there(tmp_path):
    assert not _exists(tmp_path / "a") and _exists(tmp_path) and _exists(tmp_path / ("x" * 300)) is False
    fresh = TrainingState(tmp_path / ("x" * 300), {"a": 1})
    assert (fresh.step, fresh.updates, fresh.losses, fresh.identity) == (0, 0, [], {"a": "1"})
    fresh.advance(0.5)
    assert (fresh.step, fresh.losses) == (1, [0.5])


def test_versions():
    assert not warn_if_too_old("0.20.0") and not warn_if_too_old("0.20.0rc1") and not warn_if_too_old("99.0")
    assert warn_if_too_old("0.19.9") and warn_if_too_old("0")
    assert warn_if_too_old("a fork's own") is False


def test_an_older_comfyuis_interface_is_completed():
    made = []

    class Old:
        class Float:
            class Input:
                def __init__(self, id, default=0.0):
                    made.append((id, default))

        @staticmethod
        def Schema(node_id, **others):
            return node_id, others

        @staticmethod
        def Custom(name):
            return "custom", name

    own = CompletedIO(Old)
    own.Float.Input("a", default=2.0, advanced=True)
    assert made == [("a", 2.0)] and own.BoundingBox == ("custom", "BOUNDING_BOX")
    assert own.BoundingBoxes == ("custom", "BOUNDING_BOXES")
    seeds = own.ControlAfterGenerate
    assert seeds.fixed is seeds.increment is seeds.decrement is seeds.randomize is True
    assert own.Schema("x", advanced=True) == ("x", {"advanced": True})
    assert _unknown(Old.Float.Input) >= {"advanced", "search_aliases"} and _unknown(Old.Schema) == set()
    with pytest.raises(AttributeError):
        own.Missing
