"""tools/verify_models.py on files that ultralytics, diffusers and our random layouts make, and on broken ones."""

import importlib.util

import folder_paths
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support import segmenters
from support.published_unets import PLANS, draw
from support.unconditional import make_network, write_folder


@pytest.fixture
def tool(repository, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([], ["folder"]))
    spec = importlib.util.spec_from_file_location("verify_models", repository / "tools" / "verify_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unconditional_files_and_folders(tool, tmp_path, capsys):
    pytest.importorskip("diffusers")
    save_file(draw(PLANS["p2"]), str(tmp_path / "p2.safetensors"))
    torch.save([draw(PLANS["ddpm"], 1), {}, 1, 2, draw(PLANS["ddpm"], 2)], tmp_path / "faces.ckpt")
    write_folder(tmp_path / "church", make_network("cifar10"))
    assert tool.main(["--unconditional", str(tmp_path), "--size", "16"]) == 0
    told = capsys.readouterr().out
    for line in ("ADM layout, 3 levels, 32 channels at the finest", "2 heads at 128 channels, linear betas over 1000 timesteps, 6 output",
                 "DDPM layout, 3 levels, 32 channels at the finest, the file's moving average", "fits its config.json",
                 "forward at 16x16: (1, 3, 16, 16), finite; h-space (128, 4, 4)", "3 of 3 passed"):
        assert line in told, line
    digest = tool.hashlib.sha256((tmp_path / "p2.safetensors").read_bytes()).hexdigest()
    assert f"sha256 {digest}" in told


def test_a_sample_is_drawn(tool, tmp_path):
    save_file(draw(PLANS["iddpm without scale-shift"]), str(tmp_path / "net.safetensors"))
    target = tmp_path / "look.png"
    assert tool.main(["--unconditional", str(tmp_path / "net.safetensors"), "--size", "8", "--sample", str(target)]) == 0
    assert Image.open(target).size == (8, 8)


def test_broken_unconditional_files_fail_and_the_others_are_checked(tool, tmp_path, capsys):
    state = dict(draw(PLANS["ddpm"]))
    save_file(state, str(tmp_path / "whole.safetensors"))
    save_file({**state, "conv_in.bias": torch.full((32,), torch.nan)}, str(tmp_path / "nan.safetensors"))
    del state["conv_out.bias"]
    save_file(state, str(tmp_path / "cut.safetensors"))
    assert tool.main(["--unconditional", str(tmp_path), str(tmp_path / "none.pt"), "--size", "8"]) == 1
    told = capsys.readouterr().out
    for line in ("FAILED: cut.safetensors lacks conv_out.bias", "FAILED: nan.safetensors: conv_in.bias holds NaN",
                 "FAILED: none.pt does not exist", "1 of 4 passed"):
        assert line in told, line


def test_nothing_to_check_is_no_success(tool, capsys):
    assert tool.main([]) == 2
    assert "0 of 0 passed" in capsys.readouterr().out


def test_fastsam_files(tool, tmp_path, capsys):
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("needs ultralytics")
    segmenters.save_checkpoint(tmp_path / "tiny.pt", segmenters.random_network())
    segmenters.save_checkpoint(tmp_path / "many.pt", segmenters.random_network(classes=3))
    (tmp_path / "page.onnx").write_bytes(b"<html>")
    assert tool.main(["--fastsam", str(tmp_path / "tiny.pt")]) == 0
    told = capsys.readouterr().out
    assert "depth 0.33, width 0.0625: another size than FastSAM-s and FastSAM-x; made for 64 px" in told
    assert "forward at 96x64: prediction (37, 126), prototypes (32, 16, 24), finite, scores within 0 to 1" in told
    assert tool.main(["--fastsam", str(tmp_path / "many.pt"), str(tmp_path / "page.onnx")]) == 1
    told = capsys.readouterr().out
    assert "FAILED: many.pt has 3 classes" in told and "FAILED: page.onnx" in told and "0 of 2 passed" in told
