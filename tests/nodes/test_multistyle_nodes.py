import safetensors.torch
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from comfy.samplers import calculate_sigmas, sampler_object
from support.models import tiny_cond, tiny_unet

from pastiche.nodes.multistyle import MultiStyleGuiderNode, StyleEntryNode


def lora_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v"
    width = dict(model.model.named_modules())[name].in_features
    return {f"{name}.lora_down.weight": torch.randn(2, width, generator=generator),
            f"{name}.lora_up.weight": torch.randn(width, 2, generator=generator)}


@pytest.mark.parametrize("node, identifier", [(StyleEntryNode, "PasticheStyleEntry"), (MultiStyleGuiderNode, "PasticheMultiStyleGuider")])
def test_schemas(node, identifier):
    schema = node.GET_SCHEMA()
    assert schema.node_id == identifier
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])


def test_the_guider_runs_in_sampler_custom_advanced(tmp_path, monkeypatch):
    import folder_paths

    model = tiny_unet()
    safetensors.torch.save_file(lora_of(model, 2), str(tmp_path / "ink.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    half = torch.zeros(1, 64, 64)
    half[..., :32] = 1
    (first,) = StyleEntryNode.execute(lora=lora_of(model, 1), mask=half).result
    (second,) = StyleEntryNode.execute(lora_name="ink.safetensors", mask=1 - half).result
    assert second.name == "ink.safetensors" and len(second.lora) == 2
    (guider,) = MultiStyleGuiderNode.execute(
        model, tiny_cond(model), tiny_cond(model, seed=1), 4.0, {"style0": first, "style1": second}
    ).result
    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    out = SamplerCustomAdvanced.execute(
        Noise_RandomNoise(0), guider, sampler_object("euler"), sigmas, {"samples": torch.zeros(1, 4, 8, 8)}
    ).result[0]["samples"]
    assert out.shape == (1, 4, 8, 8) and torch.isfinite(out).all()


def test_one_source_and_a_forward_range():
    model = tiny_unet()
    with pytest.raises(ValueError, match="got lora and model"):
        StyleEntryNode.execute(lora=lora_of(model), model=model)
    with pytest.raises(ValueError, match="swap them"):
        StyleEntryNode.execute(start_percent=0.7, end_percent=0.2)
