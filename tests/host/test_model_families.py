"""The whole StyleID chain on models that ComfyUI's own loaders recognise: SD1.x, SD2.x, SD2.x-v, SDXL."""

import comfy.model_base
import comfy.model_management
import pytest
import torch
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.injections.style import inject_style
from support.models import load_real
from support.sampling import random_latent, sample, schedule

FAMILIES = {
    "sd15": ("SD15", comfy.model_base.ModelType.EPS, "6-11", "SD15 has output 0-11, attention in 3-11"),
    "sd20": ("SD20", comfy.model_base.ModelType.EPS, "6-11", "SD20 has output 0-11, attention in 3-11"),
    "sd20-v": ("SD20", comfy.model_base.ModelType.V_PREDICTION, "6-11", "SD20 has output 0-11, attention in 3-11"),
    "sdxl": ("SDXL", comfy.model_base.ModelType.EPS, "0-5", "SDXL has output 0-8, attention in 0-5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_styleid_end_to_end(family):
    name, prediction, layers, sentence = FAMILIES[family]
    model = load_real(family)
    assert type(model.model.model_config).__name__ == name and model.model.model_type == prediction
    with pytest.raises(ValueError, match=sentence + ".*got output 11" if family == "sdxl" else sentence + ".*got output 12"):
        find_adapter(model).places("11" if family == "sdxl" else "12")
    sigmas = schedule(model, 2)

    def prepare(seed, size):
        noise, trajectory = invert(model, {"samples": random_latent(*size, seed=seed)}, sigmas, None, "next")
        banks = [capture(model, trajectory, streams, layers, "ram", "full") for streams in ("self_attention", "self_attention_qkv")]
        return noise, trajectory, banks

    noise, trajectory, content = prepare(1, (8, 6))
    _, _, style = prepare(2, (6, 8))
    comfy.model_management.unload_all_models()  # what a large model in between would do
    results = [
        sample(inject_style(model, s, c, 0.75, 1.5, 1.0, layers, 0.0, 1.0, None), noise["samples"], sigmas, trajectory.conditioning)
        for s, c in zip(style, content)
    ]
    plain = reconstruct(model, trajectory)
    scale = plain.abs().max()
    assert (results[0] - results[1]).abs().max() < 1e-4 * scale  # hidden state against explicit projections
    assert (results[0] - plain).abs().max() > 1e-3 * scale
