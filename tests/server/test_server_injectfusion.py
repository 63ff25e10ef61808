"""The InjectFusion workflows that need a model folder or a checkpoint, in a real ComfyUI over HTTP."""

import io
import json
import shutil

import pytest
from host import graph
from host.comfy import ServerError
from PIL import Image, ImageStat
from support.live import small_prompt, workflow_by_name
from support.unconditional import TRAINED


def show(server, prompt) -> Image.Image:
    (found,) = server.run(prompt).images
    return Image.open(io.BytesIO(server.fetch(found))).convert("RGB")


@pytest.fixture(scope="module")
def folder(server):
    """A UNet2DModel folder among the server's models."""
    target = server.base / "models" / "diffusers" / "blobs"
    shutil.copytree(TRAINED, target, dirs_exist_ok=True)
    return "blobs"


def unconditional(folder: str, size: int = 32) -> dict:
    prompt = small_prompt(workflow_by_name("injectfusion_unconditional"))
    graph.set_input(prompt, "PasticheLoadUnconditional", "folder", folder)
    for name in ("width", "height"):
        graph.set_input(prompt, "ImageScale", name, size)
    return prompt


def test_unconditional_workflow(server, folder):
    image = show(server, unconditional(folder))
    assert image.size == (32, 32) and max(ImageStat.Stat(image).stddev) > 2


def test_gamma_zero_is_the_reconstruction(server, folder):
    prompt = unconditional(folder)
    changed = show(server, prompt)
    graph.set_input(prompt, "PasticheHSpaceSlerp", "gamma", 0.0)
    graph.set_input(prompt, "PasticheInjectFusionSampler", "t_boost", 500)
    plain = show(server, prompt)
    assert plain.tobytes() != changed.tobytes()
    (sampler,) = graph.find(prompt, "PasticheInjectFusionSampler")
    prompt[sampler] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "ddim"}}
    assert show(server, prompt).tobytes() == plain.tobytes()


def test_wrong_size_and_features_are_sentences(server, folder):
    with pytest.raises(ServerError, match="multiples of 2, got 31x31"):
        server.run(unconditional(folder, 31))
    prompt = unconditional(folder)
    graph.set_input(prompt, "PasticheCaptureFeatures", "streams", "self_attention")
    with pytest.raises(ServerError, match="Unconditional DDPM"):
        server.run(prompt)


def test_checkpoint_workflow_runs_on_the_mini_model(server):
    """The same graph with the mini model's loader in the checkpoint's place: a guided run with both branches."""
    prompt = small_prompt(workflow_by_name("injectfusion"))
    (loader,), (text,) = (graph.find(prompt, name) for name in ("CheckpointLoaderSimple", "CLIPTextEncode"))
    prompt = json.loads(json.dumps(prompt).replace(f'["{loader}", 2]', f'["{loader}", 1]').replace(f'["{text}", 0]', f'["{loader}", 2]'))
    del prompt[text]
    prompt[loader] = {"class_type": "PasticheLoadMini", "inputs": {"kind": "photo"}}
    prompt["empty"] = {"class_type": "PasticheLoadMini", "inputs": {"kind": "empty"}}
    (sampling,) = graph.find(prompt, "SamplerCustom")
    prompt[sampling]["inputs"].update(negative=["empty", 2], cfg=3.0)
    graph.set_input(prompt, "PasticheHSpaceSlerp", "branch", "both")
    assert max(ImageStat.Stat(show(server, prompt)).stddev) > 2
