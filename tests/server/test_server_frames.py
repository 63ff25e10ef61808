"""Films in a real ComfyUI: the graph with core's video nodes, a film that is read, restyled and saved as a video, and Cancel."""

import json
import threading

import pytest
from host import graph
from host.comfy import Interrupted, ServerError
from support.live import small_prompt, workflow_by_name


def film_graph(server):
    """The shipped graph for checkpoints on the mini model, with a film of four frames in ComfyUI's input folder."""
    import av
    import numpy as np

    prompt = json.loads(workflow_by_name("film").read_text())
    path = server.base / "input" / "four frames.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(4):
            pixels = np.zeros((64, 96, 3), np.uint8)
            pixels[16:48, 8 * i : 8 * i + 40] = (200, 120, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    prompt["1"] = {"class_type": "PasticheLoadMini", "inputs": {"kind": "empty"}, "_meta": {"title": "Mini model"}}
    del prompt["2"]
    prompt["16"]["inputs"] |= {"vae": ["1", 1], "positive": ["1", 2], "steps": 2, "chunk": 2}
    prompt["10"]["inputs"]["file"] = path.name
    for title in ("13", "15"):
        prompt[title]["inputs"]["largest_size"] = 96
    return prompt


def test_the_graph_for_checkpoints_passes_cores_validation(server):
    """What stops it is a loader: the model and the film are there and empty."""
    with pytest.raises(ServerError, match=r"^(CheckpointLoaderSimple|GetVideoComponents|LoadVideo) \("):
        server.run(json.loads(workflow_by_name("film").read_text()))


def test_a_video_file_becomes_a_restyled_one(server):
    import av

    server.run(film_graph(server))
    output = server.base / "output"
    (video,) = output.glob("video/pastiche_*.mp4")
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 4 and frames[0].shape == (64, 96, 3) and frames[0].std() > 2
    assert len(list(output.glob("pastiche/film_*/frame_*.png"))) == 4


def test_cancel_keeps_the_chunks_that_are_written_and_the_next_run_goes_on(server):
    prompt = small_prompt(workflow_by_name("film_mini"))
    graph.set_input(prompt, "PasticheRestyleFrames", "chunk", 1)
    graph.set_input(prompt, "PasticheRestyleFrames", "filename_prefix", "cancelled/film")
    graph.set_input(prompt, "PasticheRestyleFrames", "steps", 6)
    folder, stop = server.base / "output" / "cancelled", threading.Event()

    def watch(progress):
        if prompt[progress.node]["class_type"] == "PasticheRestyleFrames" and list(folder.glob("film_*/frame_00001.png")):
            stop.set()

    def cancel():
        if stop.wait(300):
            server.interrupt()

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match="PasticheRestyleFrames"):
        server.run(prompt, watch)
    thread.join(10)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("film_*/frame_*.png")}
    assert 1 <= len(written) < 7
    server.run(prompt)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("film_*/frame_*.png")}
    assert len(after) == 7 and after["frame_00001.png"] == written["frame_00001.png"]
