"""The likeliest mistakes in a StyleID or InjectFusion graph, through a real server: each is told in the log with what to change."""

import pytest
from host import graph
from host.comfy import ServerError
from support.live import ROOT, small_prompt, workflow_by_name


def node(prompt, class_type, title=None):
    (key,) = graph.find(prompt, class_type, title)
    return prompt[key]["inputs"]


def add_noise(prompt):
    node(prompt, "SamplerCustom")["add_noise"] = True


def guidance(prompt):
    node(prompt, "SamplerCustom")["cfg"] = 7.0


def ancestral(prompt):
    node(prompt, "KSamplerSelect")["sampler_name"] = "euler_ancestral"


def encoded_picture(prompt):
    """VAE Encode's latent straight into the sampler."""
    source = node(prompt, "PasticheStyleInjection")["content"][0]
    while prompt[source]["class_type"] != "PasticheDDIMInversion":  # a Capture Features may lie between
        source = prompt[source]["inputs"]["trajectory"][0]
    node(prompt, "SamplerCustom")["latent_image"] = prompt[source]["inputs"]["latent"]


def swapped(prompt):
    injection = node(prompt, "PasticheStyleInjection")
    injection["style"], injection["content"] = injection["content"], injection["style"]


def plain_euler(prompt):
    key = max(map(int, prompt)) + 1
    prompt[str(key)] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    node(prompt, "SamplerCustom")["sampler"] = [str(key), 0]


def sde(prompt):
    node(prompt, "KSamplerSelect")["sampler_name"] = "dpmpp_2m_sde"


def ksampler(prompt):
    """The sampler that every other graph has: it adds noise, always."""
    (key,) = graph.find(prompt, "SamplerCustom", None)
    old = prompt[key]["inputs"]
    prompt[key] = {"class_type": "KSampler", "inputs": {
        **{name: old[name] for name in ("model", "positive", "negative", "latent_image")}, "seed": 0, "steps": 4, "cfg": 1.0,
        "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}}
    return prompt[key]["inputs"]


def ksampler_guidance(prompt):
    ksampler(prompt)["cfg"] = 7.0


MISTAKES = [
    ("styleid_mini", add_noise, "Turn add_noise off"),
    ("styleid_mini", ksampler, "KSampler always adds it: use SamplerCustom"),
    ("styleid_mini", guidance, "Set cfg to 1"),
    ("styleid_mini", ksampler_guidance, "Set cfg to 1"),
    ("styleid_mini", ancestral, "Choose euler"),
    ("styleid_mini", sde, "Choose euler"),
    ("styleid_mini", encoded_picture, "encoded picture, not from its inverted noise"),
    ("injectfusion_mini", plain_euler, "Connect InjectFusion Sampler"),
]


HALF = "were captured on another schedule .* Connect the same SIGMAS to DDIM Inversion and to the sampler"


def said(server, prompt):
    before = len(server.log.read_text(errors="replace"))
    server.run(prompt)
    return [line for line in server.log.read_text(errors="replace")[before:].splitlines() if "Pastiche: " in line]


@pytest.mark.parametrize("name, mistake, advice", MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake_is_told(server, name, mistake, advice):
    prompt = small_prompt(workflow_by_name(name))
    mistake(prompt)
    assert [line for line in said(server, prompt) if advice in line]


def test_swapped_pictures_of_unlike_size_are_refused(server):
    prompt = small_prompt(workflow_by_name("styleid_mini"))
    swapped(prompt)
    with pytest.raises(ServerError, match="content: its latent is .* not swapped"):
        server.run(prompt)


def test_swapped_pictures_of_one_size_are_told(server):
    prompt = small_prompt(workflow_by_name("styleid_mini"))
    swapped(prompt)
    for key in graph.find(prompt, "ImageScaleToMaxDimension"):
        prompt[key] = {"class_type": "ImageScale", "inputs": {
            "image": prompt[key]["inputs"]["image"], "upscale_method": "bilinear", "width": 128, "height": 96, "crop": "center"}}
    assert [line for line in said(server, prompt) if "Content and style look swapped" in line]


def test_half_of_the_denoising_is_refused(server):
    """A schedule of its own for the sampler, with denoise 0.5, on a picture inverted to full noise."""
    prompt = small_prompt(workflow_by_name("styleid_mini"))
    (key,) = graph.find(prompt, "BasicScheduler", None)
    prompt["half"] = {"class_type": "BasicScheduler", "inputs": {**prompt[key]["inputs"], "denoise": 0.5}}
    node(prompt, "SamplerCustom")["sigmas"] = ["half", 0]
    with pytest.raises(ServerError, match=HALF):
        server.run(prompt)


def test_the_table_in_the_docs_has_every_sentence():
    """docs/mistakes.md tells what is tested here."""
    rows = [line for line in (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    sentences = {advice for _, _, advice in MISTAKES} | {"not swapped", "Content and style look swapped", HALF.rpartition(" .* ")[2]}
    assert [sentence for sentence in sentences if not any(sentence in row for row in rows)] == []
    assert len(rows) >= len(MISTAKES) + 3


@pytest.mark.parametrize("name", ["styleid_mini", "injectfusion_mini"])
def test_the_graph_as_shipped_hears_nothing(server, name):
    prompt = small_prompt(workflow_by_name(name))
    graph.set_input(prompt, "BasicScheduler", "steps", 5)  # nothing from another test's cache
    assert [line for line in said(server, prompt) if ": Style Injection: " in line or ": h-space Slerp: " in line] == []
