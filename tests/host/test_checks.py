"""What every node asks of its inputs: each kind of nothing and of NaN is told by the input's name."""

import asyncio
import inspect

import pytest
import torch
from comfy_api.latest import io

from pastiche.nodes.extension import PasticheExtension
from pastiche.nodes.host import checks
from pastiche.nodes.host.multistyle.guider import style_entry
from pastiche.nodes.sockets import Fingerprint, Trajectory

NODES = asyncio.run(PasticheExtension().get_node_list())
NAN, INF = float("nan"), float("inf")


def spoiled(shape, value):
    tensor = torch.zeros(shape)
    tensor.flatten()[-1] = value
    return tensor


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_node_is_checked(node):
    """`checked` wraps what it is put on, whose source then begins with it."""
    assert "@checked" in inspect.getsource(node.execute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_nan_is_found_in_every_precision(dtype):
    assert checks.is_finite(torch.ones(3, 4).to(dtype))
    assert not checks.is_finite(spoiled((3, 4), NAN).to(dtype))
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        assert not checks.is_finite(spoiled((3, 4), INF).to(dtype)) and not checks.is_finite(spoiled((3, 4), -INF).to(dtype))
    assert checks.is_finite(torch.zeros(0)) and checks.is_finite(torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("tensor, message", [
    (spoiled((1, 4, 4), NAN), "mask: holds NaN"), (spoiled((4, 4), INF), "mask: holds NaN or infinite"), (torch.zeros(0, 4, 4), "mask: got a batch of 0"),
    (torch.zeros(1, 4, 0), "mask: got nothing, its shape is"), (torch.zeros(1, 1, 4, 4), "mask: expected 2 or 3 dimensions"),
    (torch.zeros(1, 4, 4, device="meta"), "mask: a meta tensor"), (torch.zeros(1, 4, 4).to_sparse(), "mask: a sparse tensor"),
    (torch.zeros(1, 4, 4, dtype=torch.complex64), "mask: a complex tensor"), ("text", "mask: expected a tensor, got str"),
    (torch.quantize_per_tensor(torch.zeros(1, 4, 4), 0.1, 0, torch.qint8), "mask: a quantised tensor"),
])
def test_masks(tensor, message):
    with pytest.raises(ValueError, match=message):
        checks.check_input(io.Mask.Input("mask"), tensor)
    checks.check_input(io.Mask.Input("mask"), torch.ones(4, 4, dtype=torch.bool))


def test_images_have_colours():
    checks.check_input(io.Image.Input("image"), torch.rand(1, 2, 2, 4))
    with pytest.raises(ValueError, match="image: got 1 channels in shape .* expected 3"):
        checks.check_input(io.Image.Input("image"), torch.rand(1, 2, 2, 1))
    with pytest.raises(ValueError, match="image: holds values up to 1e.308, which overflow"):
        checks.check_input(io.Image.Input("image"), spoiled((1, 2, 2, 3), 1.0).double() * 1e308)
    with pytest.raises(ValueError, match="image: holds NaN"):
        checks.check_input(io.Image.Input("image"), spoiled((1, 2, 2, 3), NAN))


def test_latents_and_conditionings():
    for kind in (io.Latent.Input("a"), io.MultiType.Input("a", [io.Latent, io.Noise])):
        with pytest.raises(ValueError, match="a: holds NaN .*--fp32-vae"):
            checks.check_input(kind, {"samples": spoiled((1, 4, 8, 8), NAN)})
        with pytest.raises(ValueError, match="a: expected a tensor, got NoneType"):
            checks.check_input(kind, {})
    for bad in ([[spoiled((1, 3, 4), NAN), {}]], [[torch.zeros(1, 3, 4), {"pooled_output": spoiled((1, 4), INF)}]]):
        with pytest.raises(ValueError, match="positive: holds NaN"):
            checks.check_input(io.Conditioning.Input("positive"), bad)
    with pytest.raises(ValueError, match="positive: holds no conditioning"):
        checks.check_input(io.Conditioning.Input("positive"), [])
    checks.check_input(io.Conditioning.Input("positive"), [[None, {}]])


def test_loras():
    part = io.Custom("LORA_MODEL").Input("lora")
    with pytest.raises(ValueError, match=r"lora \(a.lora_up.weight\): holds NaN"):
        checks.check_input(part, {"a.lora_up.weight": spoiled((2, 2), NAN)})
    checks.check_input(part, {"a.alpha": torch.tensor(4.0)})


@pytest.mark.parametrize("sigmas, latents, message", [
    ([0.0, 1.0, 2.0], spoiled((3, 1, 4, 2, 2), NAN), r"t \(latents\): holds NaN"), ([0.0, 2.0, 1.0], torch.zeros(3, 1, 4, 2, 2), "t: its noise levels must ascend"),
    ([0.0, NAN, 1.0], torch.zeros(3, 1, 4, 2, 2), r"t \(sigmas\): holds NaN"), ([0.1, 1.0, 2.0], torch.zeros(3, 1, 4, 2, 2), "ascend from 0"),
    ([0.0, 1.0], torch.zeros(3, 1, 4, 2, 2), "2 noise levels for latents"), ([0.0], torch.zeros(1, 1, 4, 2, 2), "1 noise levels"),
])
def test_trajectories(sigmas, latents, message):
    made = Trajectory(torch.tensor(sigmas), latents, [[None, {}]], "next", Fingerprint("a", "b"))
    with pytest.raises(ValueError, match=message):
        checks.check_trajectory(made, "t")


@pytest.mark.parametrize("value, message", [
    (NAN, "gamma: expected a finite number"), (INF, "finite"), (1e308, r"gamma: got 1e\+308, expected 0 to 1"), (-0.1, "expected 0 to 1"), ("1", "expected a number, got str"),
    (True, "expected a number, got bool"), (10**400, "gamma: got a number of 1329 bits, expected 0 to 1"),
])
def test_numbers_over_links_have_the_widgets_limits(value, message):
    with pytest.raises(ValueError, match=message):
        checks.check_input(io.Float.Input("gamma", min=0, max=1), value)
    checks.check_input(io.Float.Input("gamma", min=0, max=1), 1)


def test_shapes_that_do_not_fit_are_told_and_other_errors_stay():
    with pytest.raises(ValueError, match=r"positive: the model cannot compute with it; .*\(mat1 and mat2"), checks.unlike_shapes_told("positive"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="out of memory"), checks.unlike_shapes_told("positive"):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("content, message", [(b"<html>", "is a web page"), (b"1234567890", "cannot be read"), (b"", "cannot be read")])
def test_a_damaged_lora_file_is_told(tmp_path, monkeypatch, content, message):
    import folder_paths

    (tmp_path / "style.safetensors").write_bytes(content)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with pytest.raises(ValueError, match=message):
        style_entry("style.safetensors", start_percent=0.0, end_percent=1.0)
    with pytest.raises(ValueError, match="lora_name: 'missing' is not in models/loras"):
        style_entry("missing", start_percent=0.0, end_percent=1.0)


def test_a_schema_is_asked_for_once():
    """Some list folders, and a node runs often."""
    asked = []

    class Node:
        @classmethod
        def define_schema(cls):
            asked.append(cls)
            return io.Schema(node_id="Asked", inputs=[io.Float.Input("share", min=0.0, max=1.0)], outputs=[])

        @classmethod
        @checks.checked
        def execute(cls, share):
            return share

    assert [Node.execute(0.5), type("Copy", (Node,), {}).execute(share=1.0)] == [0.5, 1.0]  # core runs a copy of the class
    with pytest.raises(ValueError, match="share"):
        Node.execute(2.0)
    assert len(asked) == 1
