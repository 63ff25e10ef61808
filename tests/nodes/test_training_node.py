import pytest
import safetensors.torch
import torch
from support.models import tiny_cond, tiny_unet

from pastiche.nodes.host.training.plot import loss_plot
from pastiche.nodes.training import TrainStyleLoRA

SETTINGS = dict(rank=2, steps=3, learning_rate=1e-2, targets="qkv", seed=1, batch_size=1, alpha=0.0, flip=False, crop=1.0,
                min_snr_gamma=0.0, precision="model", gradient_checkpointing=False, keep_on_cancel=False, preview_every=2)


class Hidden:
    unique_id = "7"


def execute(**inputs):
    node = type("Node", (TrainStyleLoRA,), {"hidden": Hidden})
    return node.execute(**{**SETTINGS, **inputs})


def test_schema():
    schema = TrainStyleLoRA.GET_SCHEMA()
    assert schema.node_id == "PasticheTrainStyleLoRA"
    defaults = {entry.id: getattr(entry, "default", None) for entry in schema.inputs}
    assert set(SETTINGS) <= set(defaults)
    assert (defaults["rank"], defaults["steps"], defaults["learning_rate"], defaults["targets"]) == (16, 200, 2e-4, "qkv")
    assert [out.io_type for out in schema.outputs] == ["LORA_MODEL", "LOSS_MAP", "INT", "IMAGE"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])


def test_outputs_fit_cores_nodes(tmp_path, monkeypatch):
    from comfy_extras.nodes_train import LoraModelLoader, LossGraphNode, SaveLoRA

    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    model = tiny_unet()
    for steps in (1, 3):
        lora, losses, done, plot = execute(
            model=model, positive=tiny_cond(model), latents={"samples": torch.randn(1, 4, 8, 8)}, steps=steps
        ).result
        assert done == steps and plot.shape == (1, 432, 768, 3)
        SaveLoRA.execute(lora, "loras/style", done)
        (styled,) = LoraModelLoader.execute(model, lora, 1.0).result
        assert len(styled.patches) == len(lora) // 3
        graph = type("Graph", (LossGraphNode,), {"hidden": type("H", (), {"prompt": None, "extra_pnginfo": None})})
        graph.execute(losses, "loss")
    files = sorted((tmp_path / "loras").iterdir())
    assert [path.name for path in files] == ["style_1_steps_00001_.safetensors", "style_3_steps_00002_.safetensors"]
    assert set(safetensors.torch.load_file(str(files[1]))) == set(lora)


def test_wrong_connections():
    model = tiny_unet()
    with pytest.raises(ValueError, match="either latents, or image and vae"):
        execute(model=model, positive=tiny_cond(model))


def test_loss_plot_shows_points_and_their_mean():
    """Losses 0 and 2 by turns: points at the bottom and at the top, the mean of two on the line between."""
    picture = (loss_plot([0.0, 2.0] * 10, 2)[0] * 255).round().int()
    mean, point = ((picture == torch.tensor(colour)).all(dim=-1) for colour in ((205, 80, 30), (150, 175, 215)))
    plain = torch.zeros(432, 768, dtype=torch.bool)
    plain[36:390, 68:756] = True  # without the legend
    rows = (mean & plain).nonzero()
    level = (40 + 384) // 2  # half of the axis, which ends at 2
    beyond_the_first_two = rows[rows[:, 1] > 72 + 680 // 19 + 4]
    assert len(beyond_the_first_two) and ((beyond_the_first_two[:, 0] - level).abs() <= 2).all()
    heights = (point & plain).nonzero()[:, 0].unique().tolist()
    assert min(heights) <= 42 and max(heights) >= 382 and not set(range(60, 360)) & set(heights)
    assert torch.equal(loss_plot([1.0, 1.0], 20), loss_plot([1.0, 1.0], 20)) and loss_plot([0.0, 0.0], 20).shape[-1] == 3


def test_loss_plot_draws_the_held_out_loss_beside_them():
    """Losses of 1 and a held-out loss from 2 to 0: its line goes from the top left corner to the bottom right one."""
    picture = (loss_plot([1.0] * 10, 2, [(0, 2.0), (5, float("nan")), (10, 0.0)])[0] * 255).round().int()
    line = (picture == torch.tensor((30, 125, 70))).all(dim=-1)
    line[:36] = False  # the legend
    rows, columns = line.nonzero().T
    expected = 40 + (columns - 72) * (384 - 40) / (752 - 72)
    assert columns.min() <= 72 and columns.max() >= 750 and float((rows - expected).abs().max()) <= 5
    plain = (loss_plot([1.0] * 10, 2)[0] * 255).round().int()
    assert not (plain == torch.tensor((30, 125, 70))).all(dim=-1).any()


def test_the_node_hands_the_held_out_loss_to_the_plot():
    model = tiny_unet()
    latents = {"samples": torch.randn(1, 4, 8, 8)}
    plot = execute(model=model, positive=tiny_cond(model), latents=latents, validation_every=1).result[3]
    assert ((plot * 255).round().int() == torch.tensor((30, 125, 70))).all(dim=-1).any()


def test_seed_starts_fixed():
    seed = next(entry for entry in TrainStyleLoRA.GET_SCHEMA().inputs if entry.id == "seed")
    assert seed.as_dict()["control_after_generate"] == "fixed"
