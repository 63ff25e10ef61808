"""The shipped API workflows run in a real ComfyUI, can be cancelled, and give the same image again."""

import io
import json
import threading
import time

import pytest
from host import graph
from host.comfy import Interrupted, Server, ServerError, make_base
from PIL import Image, ImageStat
from support.live import API_WORKFLOWS, MINI_WORKFLOWS, small_prompt, workflow_by_name

REFERENCES = [path for path in API_WORKFLOWS if path.stem.startswith(("restyle_", "style_reference_")) and path not in MINI_WORKFLOWS]


def check_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert max(ImageStat.Stat(image).stddev) > 2, "the image is blank"
    return image


@pytest.mark.parametrize("path", MINI_WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_gives_its_images(server, path):
    prompt = small_prompt(path)
    result = server.run(prompt)
    expected = graph.find(prompt, "SaveImage") + graph.find(prompt, "PreviewImage")
    assert expected, "the workflow shows no image"
    shown = {image["node"] for image in result.images}
    assert set(expected) <= shown
    for image in result.images:
        check_image(server.fetch(image))


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_graphs_of_large_models_pass_cores_validation(server, path):
    """What stops them is a loader: the models' files are there and empty."""
    with pytest.raises(ServerError, match=r"^(UNETLoader|CheckpointLoaderSimple|CLIPLoader|DualCLIPLoader|VAELoader) \("):
        server.run(json.loads(path.read_text()))


def test_same_graph_same_image(server):
    images = []
    for _ in range(2):
        server.request("/free", {"unload_models": True, "free_memory": True})  # no cached outputs the second time
        time.sleep(1.5)
        result = server.run(small_prompt(workflow_by_name("styleid_mini")))
        assert not result.cached
        images.append(server.fetch(result.images[0]))
    assert check_image(images[0]).tobytes() == check_image(images[1]).tobytes()


@pytest.mark.parametrize("name, class_type", [
    ("styleid_mini", "PasticheDDIMInversion"), ("injectfusion_mini", "PasticheCaptureFeatures"), ("styleid_mini", "SamplerCustom"),
])
def test_cancel_ends_within_a_step_and_the_next_prompt_runs(server, name, class_type):
    prompt = small_prompt(workflow_by_name(name))
    # inputs that no other test uses, so that nothing comes from the cache
    graph.set_input(prompt, "BasicScheduler", "steps", 40)
    graph.set_input(prompt, "PasticheDDIMInversion", "scheme", "next")
    graph.set_input(prompt, "ImageScaleToMaxDimension", "largest_size", 96 + 8 * len(class_type) % 64)
    running, seen = threading.Event(), {"value": 0, "cancelled at": None}

    def watch(progress):
        if prompt[progress.node]["class_type"] == class_type:
            seen["value"] = progress.value
            if progress.value >= 2:
                running.set()

    def cancel():
        if running.wait(300):
            server.interrupt()
            seen["cancelled at"] = seen["value"]

    # from a thread: the answer to the request must not depend on the messages being read
    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match=class_type):
        server.run(prompt, watch)
    thread.join(10)
    assert seen["value"] <= seen["cancelled at"] + 2, "more than the step that ran was finished"
    assert server.run(small_prompt(workflow_by_name("styleid_mini"))).images


def test_error_is_a_sentence_with_the_node(server):
    prompt = small_prompt(workflow_by_name("styleid_mini"))
    graph.set_input(prompt, "PasticheStyleInjection", "layers", "99")
    with pytest.raises(ServerError, match=r"(?s)PasticheStyleInjection.*99"):
        server.run(prompt)


@pytest.mark.slow
def test_the_pack_changes_nothing_of_others(server, live_host, tmp_path):
    with Server(live_host, make_base(tmp_path / "bare", pack=False)) as bare:
        without, loaded = bare.object_info(), server.object_info()
    own = [name for name in loaded if name not in without]
    assert own and all(loaded[name]["python_module"] == "custom_nodes.pastiche" for name in own)
    for name, node in without.items():
        # lists of files differ with what the two base directories hold
        assert _without_choices(node) == _without_choices(loaded[name]), name


def _without_choices(node: dict) -> str:
    node = json.loads(json.dumps(node))
    for group in node["input"].values():
        for value in group.values():
            if isinstance(value[0], list):
                value[0] = "COMBO"
            if len(value) > 1 and isinstance(value[1], dict):
                value[1].pop("options", None)
                value[1].pop("default", None)
    return json.dumps(node, sort_keys=True)
