"""Checkpoints: what is read, what is refused, and that nothing in a file runs."""

import importlib.util
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch
import yaml

from support import segmenters

segmenters.require_ultralytics()

from pastiche.nodes.host.fastsam import checkpoint as fastsam_format
from pastiche.nodes.host.fastsam.checkpoint import read_checkpoint, save_safetensors
from pastiche.nodes.host.fastsam.network import TorchNetwork


@pytest.fixture(scope="module")
def network():
    return segmenters.random_network()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt") / "FastSAM-tiny.pt"
    segmenters.save_checkpoint(path, network)
    return path


def test_pt_gives_the_same_network(network, checkpoint):
    weights = read_checkpoint(str(checkpoint))
    assert (weights.depth, weights.width, weights.max_channels, weights.size) == (0.33, 0.0625, 1024, 64)
    expected = network.state_dict()
    assert weights.state.keys() == expected.keys()
    assert all(torch.equal(weights.state[key], expected[key]) for key in expected)


def test_loaded_network_computes_what_ultralytics_computes(network, checkpoint):
    loaded = TorchNetwork(read_checkpoint(str(checkpoint)), "tiny")
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    prediction, prototypes = loaded(picture)
    reference = network.float().eval()
    with torch.no_grad():
        (expected, expected_prototypes), _ = reference(picture)
    torch.testing.assert_close(prediction, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prototypes, expected_prototypes[0], rtol=1e-5, atol=1e-5)
    assert prediction.shape == (37, 8 * 12 + 4 * 6 + 2 * 3) and prototypes.shape == (32, 16, 24)


def test_safetensors_round_trip(checkpoint, tmp_path):
    weights = read_checkpoint(str(checkpoint))
    path = tmp_path / "tiny.safetensors"
    save_safetensors(weights, str(path))
    again = read_checkpoint(str(path))
    assert (again.depth, again.width, again.max_channels, again.size) == (0.33, 0.0625, 1024, 64)
    assert all(torch.equal(again.state[key], weights.state[key]) for key in weights.state)
    assert os.listdir(tmp_path) == ["tiny.safetensors"]


def test_notes_of_an_interrupted_training_are_read(tmp_path):
    path = tmp_path / "last.pt"
    notes = {
        "best_fitness": np.float64(0.5),
        "train_args": {"imgsz": 96, "save_dir": pathlib.PosixPath("runs")},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    segmenters.save_checkpoint(path, segmenters.random_network(), **notes)
    assert read_checkpoint(str(path)).size == 96


def test_reading_imports_and_runs_nothing_of_ultralytics(checkpoint, monkeypatch):
    import ultralytics.nn.modules

    def explode(*_, **__):
        raise AssertionError("code of ultralytics ran while reading a file")

    monkeypatch.setattr(ultralytics.nn.modules.Conv, "__init__", explode)
    monkeypatch.setattr(torch.nn.Module, "__setstate__", explode)
    assert read_checkpoint(str(checkpoint)).state


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_pickle_is_refused_and_not_run(network, tmp_path):
    ran = tmp_path / "ran"
    for name, notes in {"alone.pt": None, "beside.pt": {"date": Payload(ran)}}.items():
        path = tmp_path / name
        if notes is None:
            torch.save(Payload(ran), path)
        else:
            segmenters.save_checkpoint(path, network, **notes)
        with pytest.raises(ValueError, match="refused, and nothing in it was run") as refusal:
            read_checkpoint(str(path))
        assert "system" in str(refusal.value)
        assert not ran.exists()
    os.system(f"touch {ran}")
    assert ran.exists()  # the payload would have worked


def test_allow_list_holds_no_code():
    for record, name in fastsam_format._named_records():
        assert record.__mro__[1] is fastsam_format.Record, name
    assert set(vars(fastsam_format.Record)) & {"__call__", "__getattr__", "__reduce__", "__del__"} == set()


def test_code_in_a_layout_does_not_reach_the_builder(tmp_path):
    model = segmenters.random_network()
    model.yaml = {**model.yaml, "activation": "__import__('os').system('true')"}
    segmenters.save_checkpoint(tmp_path / "a.pt", model)
    with pytest.raises(ValueError, match="not laid out as YOLOv8-seg"):
        read_checkpoint(str(tmp_path / "a.pt"))


def test_the_layout_is_ultralytics_own():
    """Its file, read and not imported: networks of these tests are built from our layout."""
    package = pathlib.Path(importlib.util.find_spec("ultralytics").origin).parent
    theirs = yaml.safe_load((package / "cfg" / "models" / "v8" / "yolov8-seg.yaml").read_text(encoding="utf-8"))
    ours = fastsam_format.SegmenterWeights(0.33, 0.5, 1024, 640, {}).layout()
    for part in ("backbone", "head"):
        rows = [[source, count, module, [None if value == "None" else value for value in arguments]]
                for source, count, module, arguments in theirs[part]]
        assert ours[part] == rows
    assert theirs["scales"]["s"] == [0.33, 0.5, 1024] and ours["scales"]["own"] == [0.33, 0.5, 1024] and ours["nc"] == 1


@pytest.mark.parametrize("change, message", [
    ({"backbone": [[-1, 1, "Conv"]]}, "does not describe a YOLOv8-seg network"),
    ({"scales": {"s": [1.0, 2.0]}, "scale": "s"}, "does not describe a YOLOv8-seg network"),
    ({"scales": None, "depth_multiple": "deep", "width_multiple": 1.0}, "does not describe a YOLOv8-seg network"),
    ({"scales": {"s": ["deep", 0.5, 1024]}, "scale": "s", "head": [[-1, 1, "Segment", ["nc"]]]}, "does not describe"),
])
def test_an_odd_layout_is_refused_by_the_files_name(tmp_path, change, message):
    model = segmenters.random_network()
    model.yaml = {**model.yaml, **change}
    segmenters.save_checkpoint(tmp_path / "odd.pt", model)
    with pytest.raises(ValueError, match=f"^odd.pt {message}"):
        read_checkpoint(str(tmp_path / "odd.pt"))


@pytest.mark.parametrize("sides, expected", [([64, 96], 96), ((64, None), 64), ([], 640), ("64", 640), (None, 640)])
def test_the_size_it_was_trained_with(tmp_path, sides, expected):
    segmenters.save_checkpoint(tmp_path / "a.pt", segmenters.random_network(), train_args={"imgsz": sides})
    assert read_checkpoint(str(tmp_path / "a.pt")).size == expected


def test_a_damaged_pickle_is_told_by_the_files_name(checkpoint, tmp_path):
    path = tmp_path / "damaged.pt"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(path, "w") as out:
        for entry in source.infolist():
            out.writestr(entry.filename, b"\xff" if entry.filename.endswith("data.pkl") else source.read(entry))
    with pytest.raises(ValueError, match="^damaged.pt cannot be read"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_truncated_files(checkpoint, tmp_path, kind, keep):
    source = checkpoint
    if kind == "safetensors":
        source = tmp_path / "whole.safetensors"
        save_safetensors(read_checkpoint(str(checkpoint)), str(source))
    whole = source.read_bytes()
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(ValueError, match="truncated"):
        read_checkpoint(str(path))


def test_detection_model(tmp_path):
    segmenters.save_checkpoint(tmp_path / "yolov8n.pt", segmenters.random_network(kind="detect"))
    with pytest.raises(ValueError, match="DetectionModel.*no masks.*-seg"):
        read_checkpoint(str(tmp_path / "yolov8n.pt"))


def test_wrong_class_count(tmp_path):
    segmenters.save_checkpoint(tmp_path / "yolov8n-seg.pt", segmenters.random_network(classes=80))
    with pytest.raises(ValueError, match="80 classes; FastSAM has 1"):
        read_checkpoint(str(tmp_path / "yolov8n-seg.pt"))


def test_other_contents(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no ultralytics model"):
        read_checkpoint(str(tmp_path / "other.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no ultralytics model"):
        read_checkpoint(str(tmp_path / "list.pt"))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="'.bin'"):
        read_checkpoint(str(tmp_path / "model.bin"))


def test_safetensors_of_something_else(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected 'yolov8-seg'"):
        read_checkpoint(str(tmp_path / "a.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"format": "yolov8-seg", "depth": "nan"})
    with pytest.raises(ValueError, match="metadata lacks"):
        read_checkpoint(str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("numbers", [{"depth": float("nan")}, {"width": 99.0}, {"max_channels": 0}, {"size": 1}])
def test_impossible_scale(checkpoint, tmp_path, numbers):
    weights = read_checkpoint(str(checkpoint))
    for key, value in numbers.items():
        setattr(weights, key, value)
    save_safetensors(weights, str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="impossible YOLOv8 scale"):
        read_checkpoint(str(tmp_path / "a.safetensors"))


def test_missing_and_misshapen_tensors(checkpoint):
    weights = read_checkpoint(str(checkpoint))
    kept = weights.state.pop("model.4.cv1.bn.weight")
    with pytest.raises(ValueError, match="1 tensors are missing.*model.4.cv1.bn.weight"):
        TorchNetwork(weights, "tiny")
    weights.state["model.4.cv1.bn.weight"] = kept[:1]
    with pytest.raises(ValueError, match=r"model.4.cv1.bn.weight is \(1,\)"):
        TorchNetwork(weights, "tiny")


def test_without_ultralytics_only_loading_a_checkpoint_fails(checkpoint, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    weights = read_checkpoint(str(checkpoint))
    with pytest.raises(ValueError, match="pip install --no-deps ultralytics opencv-python-headless"):
        TorchNetwork(weights, "tiny")


def test_import_leaves_the_process_as_it_was(comfyui, repository):
    """In a fresh process: torch.save, print options, OpenCV threads, variables and the console stay as they were."""
    import subprocess
    import sys

    script = """
import sys; sys.argv = ["x"]; sys.path.insert(0, "tests"); import conftest
import io, contextlib, os, torch, numpy, cv2
from pastiche.nodes.host.fastsam import network as fastsam_network
seen = lambda: (torch.save, str(vars(torch._tensor_str.PRINT_OPTS)), str(numpy.get_printoptions()), cv2.getNumThreads(),
                dict(os.environ))
before = seen()
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
    fastsam_network._segmentation_model()
assert seen() == before, (before, seen())
assert text.getvalue() == "", text.getvalue()
import ultralytics.utils as settings
folder, user = str(settings.USER_CONFIG_DIR), __import__("folder_paths").get_user_directory()
assert folder.startswith(user) and not settings.AUTOINSTALL and not settings.ONLINE, (folder, user)
print("unchanged")
"""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("YOLO_")}
    variables["COMFYUI_PATH"] = str(comfyui)
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True)
    assert answer.stdout.strip().endswith("unchanged"), answer.stdout + answer.stderr


# ---- files that ask for more than they hold ----


def save_modules(path, model):
    torch.save({"model": model, "train_args": {"imgsz": 64}}, path)


def test_shared_and_self_referring_modules_are_visited_once(tmp_path):
    """34 levels that each name the level below twice would be 2 ** 34 visits."""
    from ultralytics.nn.tasks import SegmentationModel

    level = torch.nn.Sequential(torch.nn.Identity())
    for _ in range(34):
        above = torch.nn.Sequential()
        above._modules.update(a=level, b=level)
        level = above
    model = torch.nn.Module.__new__(SegmentationModel)
    torch.nn.Module.__init__(model)
    model._modules.update(model=level)
    level._modules["again"] = level
    save_modules(tmp_path / "shared.pt", model)
    with pytest.raises(ValueError, match="shared.pt does not describe a YOLOv8-seg network"):
        read_checkpoint(str(tmp_path / "shared.pt"))


def test_a_file_that_claims_billions_of_weights_takes_no_memory(tmp_path, monkeypatch):
    import safetensors.torch

    names = {"model.22.cv3.0.2.weight": 1, "model.22.cv4.0.2.weight": 32, "model.22.proto.cv3.conv.weight": 32}
    path = tmp_path / "claims.safetensors"
    metadata = {"format": "yolov8-seg", "depth": "4", "width": "4", "max_channels": "65536", "size": "640"}
    safetensors.torch.save_file({name: torch.zeros(count, 1, 1, 1) for name, count in names.items()}, str(path), metadata)
    weights = read_checkpoint(str(path))

    class Never:
        def __init__(self, *_, **__):
            raise AssertionError("a network was built")

    from pastiche.nodes.host.fastsam import network as fastsam_network

    monkeypatch.setattr(fastsam_network, "_segmentation_model", lambda: Never)
    with pytest.raises(ValueError, match="claims.safetensors does not fit YOLOv8-seg of depth 4.0, width 4.0"):
        TorchNetwork(weights, path.name)


class Grabs:
    def __reduce__(self):
        return bytearray, (1 << 40,)


def test_a_pickle_that_asks_for_memory_is_refused(network, tmp_path):
    path = tmp_path / "grabs.pt"
    segmenters.save_checkpoint(path, network, date=Grabs())
    with pytest.raises(ValueError, match="refused, and nothing in it was run: it names .*bytearray"):
        read_checkpoint(str(path))


def test_a_compressed_archive_is_refused(checkpoint, tmp_path):
    import zipfile

    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match="bomb.pt is a compressed archive"):
        read_checkpoint(str(path))


def test_a_web_page_is_told(tmp_path):
    (tmp_path / "page.pt").write_text("<!doctype html><title>404</title>")
    with pytest.raises(ValueError, match="page.pt is a web page, not a model"):
        read_checkpoint(str(tmp_path / "page.pt"))


def test_other_packs_allow_lists_change_nothing_and_stay(checkpoint):
    from ultralytics.nn.tasks import SegmentationModel

    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([SegmentationModel, os.system])
        listed = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(str(checkpoint)).state
        assert set(torch.serialization.get_safe_globals()) == listed
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_weights_that_are_no_numbers_are_told(checkpoint, tmp_path):
    for value, message in ((float("nan"), "holds NaN or infinite"), (float("inf"), "holds NaN or infinite")):
        weights = read_checkpoint(str(checkpoint))
        weights.state["model.4.cv1.bn.weight"][0] = value
        save_safetensors(weights, str(tmp_path / "a.safetensors"))
        with pytest.raises(ValueError, match=f"a.safetensors: model.4.cv1.bn.weight {message}"):
            read_checkpoint(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("change, kind", [
    (lambda tensor: tensor.to("meta"), "meta"), (lambda tensor: tensor.float().to_sparse(), "sparse"),
    (lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape), "repeated"), (lambda tensor: tensor.to(torch.complex64), "complex"),
])
def test_tensors_that_hold_nothing_are_told(checkpoint, change, kind):
    weights = read_checkpoint(str(checkpoint))
    weights.state["model.4.cv1.bn.weight"] = change(weights.state["model.4.cv1.bn.weight"])
    with pytest.raises(ValueError, match=f"model.4.cv1.bn.weight is a {kind} tensor"):
        fastsam_format._check_tensors(weights, "file.pt")


def test_a_network_that_computes_nan_is_told():
    class Broken:
        size, fixed_size = 64, None

        def __call__(self, picture):
            return torch.full((37, 4), float("nan")), torch.zeros(32, 16, 16)

    from pastiche.nodes.host.fastsam.model import FastSAM

    with pytest.raises(ValueError, match="fastsam: broken.pt computes NaN"):
        FastSAM("broken.pt", Broken()).segment(torch.rand(64, 64, 3))
