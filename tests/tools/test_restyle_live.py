"""tools/restyle.py with two ComfyUIs, one of which is killed on the way."""

import json
import os
import signal
import threading
import time
from collections import Counter

import pytest
import restyle
from host import environment
from host.comfy import Server, make_base
from PIL import Image, ImageOps, ImageStat

SMALL = ["--set", "Content size.largest_size=64", "--set", "Style size.largest_size=64", "--set", "Schedule.steps=2"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_eight_pictures_on_two_servers_one_of_which_is_killed(server, live_host, tmp_path, capsys):
    samples = environment.ROOT / "assets" / "samples"
    for kind, count in (("content", 2), ("style", 2)):
        (tmp_path / kind).mkdir()
        for path in sorted(path for path in samples.glob(f"{kind}_*") if path.suffix in (".jpg", ".png"))[:count]:
            with Image.open(path) as image:
                image.convert("RGB").save(tmp_path / kind / f"{path.stem}.png")
                if kind == "content":
                    ImageOps.mirror(image.convert("RGB")).save(tmp_path / kind / f"{path.stem} gespiegelt ä.png")
    out = tmp_path / "out"

    def lines():
        text = (out / "restyle.jsonl").read_text() if (out / "restyle.jsonl").is_file() else ""
        return [line for line in map(json.loads, text.splitlines()) if "name" in line]

    with Server(live_host, make_base(tmp_path / "base")) as doomed:
        def kill():
            while not any(line["server"] == doomed.url for line in lines()):
                time.sleep(0.02)
            os.killpg(doomed.pid, signal.SIGKILL)
            killed.set()

        killed = threading.Event()
        threading.Thread(target=kill, daemon=True).start()
        folders = [str(tmp_path / "content"), str(tmp_path / "style")]
        code = restyle.main([*folders, "--servers", f"{doomed.url},{server.url}", "--output", str(out), "--patience", "1", *SMALL])
    said = capsys.readouterr()
    assert code == 0 and killed.is_set() and "8 made" in said.out, said.out + said.err
    made = lines()
    assert len({(line["content"], line["style"]) for line in made}) == len(made) == 8 == len(list(out.glob("*.png")))
    by_server = Counter(line["server"] for line in made)
    assert set(by_server) == {doomed.url, server.url}
    # ComfyUI kept what was to be kept: on each server every picture was inverted at most once
    for url in by_server:
        ran = [line for line in made if line["server"] == url]
        for title, side in (("Invert content", "content"), ("Invert style", "style")):
            assert max(Counter(line[side] for line in ran if title in line["ran"]).values()) == 1
    pictures = {}
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert max(image.size) == 64 and max(ImageStat.Stat(image.convert("RGB")).stddev) > 2
            pictures[image.convert("RGB").tobytes()] = path.name
    assert len(pictures) == 8


def test_styles_of_a_real_servers_library(server, tmp_path, capsys):
    samples = environment.ROOT / "assets" / "samples"
    arguments = [str(samples / "content_coffee.jpg"), "library:ready/comic,ready/woodcut", "--servers", server.url]
    small = ["--set", "Photo size.largest_size=64", "--set", "Style library.size=64", "--set", "Schedule.steps=2"]
    assert restyle.main([*arguments, "--output", str(tmp_path / "out"), *small]) == 0
    made = [Image.open(tmp_path / "out" / f"content_coffee_{style}.png").convert("RGB") for style in ("comic", "woodcut")]
    assert [max(image.size) for image in made] == [64, 64] and made[0].tobytes() != made[1].tobytes()
    lines = [json.loads(line) for line in (tmp_path / "out" / "restyle.jsonl").read_text().splitlines()]
    assert sum(line.get("ran", []).count("Invert content") for line in lines) == 1
    assert restyle.main([arguments[0], "library:ready/nobody", *arguments[2:], "--output", str(tmp_path / "none"), *small]) == 1
    assert "is left out" in (said := capsys.readouterr().out) and "ready/nobody" in said
