"""The InjectFusion nodes as a graph runs them: inversion, capture, slerp, sampler, decode."""

import json

import folder_paths
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.unconditional import make_network, write_folder

from pastiche.nodes.features import CaptureFeatures
from pastiche.nodes.injectfusion import HSpaceSlerp, InjectFusionSampler
from pastiche.nodes.inversion import DDIMInversion
from pastiche.nodes.unconditional import LoadUnconditional


def run(node, **inputs):
    return node.execute(**inputs).result


def inputs_of(node):
    return {item.id: item for item in node.define_schema().inputs}


def test_inputs_that_scripts_rely_on():
    slerp, sampler = inputs_of(HSpaceSlerp), inputs_of(InjectFusionSampler)
    assert list(slerp)[:6] == ["model", "content", "gamma", "t_edit", "branch", "mask"]
    assert list(sampler)[:3] == ["omega", "t_boost", "seed"]
    defaults = {**slerp, **sampler}
    assert [defaults[k].default for k in ("gamma", "t_edit", "branch", "omega", "t_boost")] == [0.6, 400, "conditional", 0.3, 200]
    assert slerp["branch"].options == ["conditional", "both"] and slerp["mask"].optional
    assert [slerp["schedule"].advanced, sampler["dt_lambda"].advanced] == [True, True]
    assert list(inputs_of(LoadUnconditional))[0] == "folder"


def test_graph_on_a_latent_model():
    model = tiny_unet()
    positive, sigmas = tiny_cond(model), schedule(model, 4)
    noise, *_ = run(DDIMInversion, model=model, latent={"samples": random_latent()}, sigmas=sigmas, positive=positive)
    content = {"samples": random_latent(16, 8, seed=4)}
    _, trajectory, *_ = run(DDIMInversion, model=model, latent=content, sigmas=sigmas, positive=positive)
    (bank,) = run(CaptureFeatures, model=model, trajectory=trajectory, streams="h_space")
    (patched,) = run(HSpaceSlerp, model=model, content=bank, t_edit=300)
    (sampler,) = run(InjectFusionSampler, omega=0.3, t_boost=0, seed=1)
    settings = dict(add_noise=False, noise_seed=0, cfg=1.0, positive=positive, negative=positive, sampler=sampler,
                    sigmas=sigmas, latent_image=noise)
    injected = run(SamplerCustom, model=patched, **settings)[0]["samples"]
    assert torch.isfinite(injected).all() and injected.shape == noise["samples"].shape
    plain = run(SamplerCustom, model=model, **settings)[0]["samples"]
    assert torch.equal(plain, sample(model, noise["samples"], sigmas, positive, sampler="ddim"))
    assert (injected - plain).abs().max() > 1e-2
    assert torch.equal(run(SamplerCustom, model=patched, **settings)[0]["samples"], injected)


def test_graph_on_pixels(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], ["folder"]))
    write_folder(tmp_path / "lsun", make_network("cifar10"))
    folder = inputs_of(LoadUnconditional)["folder"]
    assert folder.options == ["lsun"]
    model, vae, empty = run(LoadUnconditional, folder="lsun")
    sigmas = schedule(model, 3, "simple")
    images = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    latents = [{"samples": vae.encode(images[i : i + 1])} for i in range(2)]
    noise, *_ = run(DDIMInversion, model=model, latent=latents[0], sigmas=sigmas, positive=empty, scheme="next")
    _, trajectory, *_ = run(DDIMInversion, model=model, latent=latents[1], sigmas=sigmas, scheme="next")
    (bank,) = run(CaptureFeatures, model=model, trajectory=trajectory, streams="h_space", memory="ram")
    (patched,) = run(HSpaceSlerp, model=model, content=bank, gamma=0.5)
    (sampler,) = run(InjectFusionSampler)
    out = run(SamplerCustom, model=patched, add_noise=False, noise_seed=0, cfg=1.0, positive=empty, negative=empty,
              sampler=sampler, sigmas=sigmas, latent_image=noise)[0]
    image = vae.decode(out["samples"])
    assert image.shape == (1, 16, 24, 3) and 0 <= image.min() and image.max() <= 1


def test_attention_features_are_no_h_space(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], ["folder"]))
    write_folder(tmp_path / "lsun", make_network("cifar10"))
    model, _, _ = run(LoadUnconditional, folder="lsun")
    latent = {"samples": torch.zeros(1, 3, 16, 16)}
    _, trajectory, *_ = run(DDIMInversion, model=model, latent=latent, sigmas=schedule(model, 2, "simple"), scheme="next")
    for layers in ("6-11", "auto"):
        with pytest.raises(ValueError, match="Unconditional DDPM has no attention blocks.*use h_space"):
            run(CaptureFeatures, model=model, trajectory=trajectory, streams="self_attention", layers=layers)


@pytest.mark.parametrize("name", ["injectfusion", "injectfusion_mini", "injectfusion_unconditional", "injectfusion_sweep_mini"])
def test_workflows_name_inputs_that_exist(repository, name):
    prompt = json.loads((repository / "workflows" / "api" / f"{name}.json").read_text())
    ours = {node.define_schema().node_id: inputs_of(node) for node in (HSpaceSlerp, InjectFusionSampler, LoadUnconditional)}
    used = [node for node in prompt.values() if node["class_type"] in ours]
    assert used
    for node in used:
        assert set(node["inputs"]) <= set(ours[node["class_type"]])
