"""An inversion is found again in a running ComfyUI: where a node upstream ran again and gave the same picture."""

import io
import time

import pytest
from host import graph
from host.comfy import Server, make_base
from PIL import Image
from support.live import ROOT, small_prompt, workflow_by_name

FOUND = "found again: the inversion"
SAMPLES = ROOT / "assets" / "samples"


def prompt_of(picture, gamma):
    """StyleID's workflow with a content that is loaded from a file."""
    prompt = small_prompt(workflow_by_name("styleid_mini"))
    prompt["10"] = {"class_type": "LoadImage", "inputs": {"image": picture}, "_meta": prompt["10"]["_meta"]}
    graph.set_input(prompt, "PasticheStyleInjection", "gamma", gamma)
    return prompt


@pytest.fixture
def pictures(server):
    path = next(path for path in sorted(SAMPLES.glob("*.jpg")))
    return [server.upload(path, f"found_again_{name}.jpg") for name in "abc"]


def test_another_gamma_does_not_invert_again(server, pictures):
    def run(picture, gamma):
        before = server.log.read_text().count(FOUND)
        result = server.run(prompt_of(picture, gamma))
        assert "17" not in result.cached  # the content's inversion ran, as its input is another file
        return server.fetch(result.images[0]), server.log.read_text().count(FOUND) - before

    run(pictures[0], 0.7)
    changed, found = run(pictures[1], 0.2)
    assert found == 1
    server.request("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    computed, found = run(pictures[2], 0.2)
    assert found == 0 and "kept to be found again are let go" in server.log.read_text(), "ComfyUI was asked to free its results"
    assert pixels(changed) == pixels(computed)


def pixels(data):
    return Image.open(io.BytesIO(data)).tobytes()  # the files also hold the graph


def test_the_setting_switches_it_off(live_host, tmp_path, monkeypatch):
    monkeypatch.setenv("PASTICHE_CACHE_MB", "0")
    with Server(live_host, make_base(tmp_path)) as server:
        names = [server.upload(next(iter(sorted(SAMPLES.glob("*.jpg")))), f"{name}.jpg") for name in "ab"]
        for name, gamma in zip(names, (0.7, 0.2)):
            assert "17" not in server.run(prompt_of(name, gamma)).cached
        assert FOUND not in server.log.read_text()
