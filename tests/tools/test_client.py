"""The client that ships with the graphs: titles, what it refuses, and README's example as it stands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pastiche_client import ComfyUI, Graph, load
from PIL import Image, ImageStat

ROOT = Path(__file__).resolve().parents[2]


def example() -> str:
    """README's script."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From a script")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_graphs_go_by_titles():
    graph = load("styleid_mini")
    assert graph.titles["Style injection"]["gamma"] == 0.75 and "model" not in graph.titles["Style injection"]
    graph.set("Style injection", gamma=0.3, temperature=1.0)
    assert graph.titles["Style injection"] == {**load("styleid_mini").titles["Style injection"], "gamma": 0.3, "temperature": 1.0}
    key = next(key for key, node in graph.items() if node["_meta"]["title"] == "Content")
    graph.picture("Content", "mine.png")
    assert graph[key] == {"class_type": "LoadImage", "inputs": {"image": "mine.png"}, "_meta": {"title": "Content"}}


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda g: g.set("Contnt", x=1), "no node has the title 'Contnt'; there are .*'Content'"),
        (lambda g: g.set("Style injection", gama=1), "has no input 'gama' to set; it has gamma, temperature"),
        (lambda g: g.set("Style injection", model=1), "has no input 'model'"),  # a link
        (lambda g: g.picture("Sample", "a.png"), "'Sample' is a SamplerCustom, not a picture"),
    ],
)
def test_mistakes_are_sentences(act, words):
    graph = load("styleid_mini")
    with pytest.raises(ValueError, match=words):
        act(graph)
    assert graph == load("styleid_mini")


def test_any_graph_by_its_path(tmp_path):
    (tmp_path / "g.json").write_text(json.dumps({"1": {"class_type": "A", "inputs": {"x": 1}}}))
    graph = load(tmp_path / "g.json")
    assert isinstance(graph, Graph) and graph.titles == {"A": {"x": 1}}


@pytest.mark.parametrize("url", ["127.0.0.1:8188", "https://example.org", "ws://x"])
def test_addresses(url):
    with pytest.raises(ValueError, match="http://127.0.0.1:8188"):
        ComfyUI(url)


def test_the_example_is_short_and_the_client_ships():
    assert len(example().strip().splitlines()) <= 20
    ignored = (ROOT / ".comfyignore").read_text().split()
    assert not [line for line in ignored if "workflows/api/pastiche_client.py".startswith(line.strip("/") + "/")]
    kept = {name: [node["_meta"]["title"] for node in load(name).values()] for name in re.findall(r'load\("(\w+)"\)', example())}
    for name, titles in kept.items():
        assert set(re.findall(r'\.(?:set|picture)\("([^"]+)"', example())) <= set(titles), name


def test_the_example_runs_when_pasted(server, tmp_path):
    """Only the address, the pack's place and the number of steps are changed."""
    pack = Path(server.base) / "custom_nodes" / "pastiche"
    text = example().replace("http://127.0.0.1:8188", server.url).replace("ComfyUI/custom_nodes/pastiche", str(pack))
    text, changed = re.subn(r"steps=\d+", "steps=2", text)
    text, sized = re.subn(r"largest_size=\d+", "largest_size=96", text)
    assert server.url in text and str(pack) in text and changed == 1 and sized == 2
    for name, file in (("photo.jpg", "content_coffee.jpg"), ("painting.png", "style_woodcut.png")):
        shutil.copy(ROOT / "assets" / "samples" / file, tmp_path / name)
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run([sys.executable, "-I", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "stylised.png") as image:
        assert max(image.size) == 96 and max(ImageStat.Stat(image.convert("RGB")).stddev) > 2
    assert "Sample" in done.stdout  # progress, by title
