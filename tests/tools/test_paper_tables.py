"""benchmarks/tables.py and the two tables: pairs, names, graphs, and what an interrupted run keeps."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image


@pytest.fixture
def benchmark(repository, monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    names = ("tables", "styleid_table", "injectfusion_table")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def tables(benchmark):
    return benchmark("tables")


def picture(path, colour=(10, 200, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_fewer_pairs_are_those_of_the_first_pictures(tables):
    contents, styles = list("abc"), list("xyz")
    assert tables.choose_pairs(contents, styles, 4) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert len(tables.choose_pairs(contents, styles, None)) == 9


def test_pictures_need_names_that_differ(tables, tmp_path):
    first = picture(tmp_path / "b.png")
    assert tables.pictures_of(tmp_path) == [first]
    picture(tmp_path / "b.jpg")
    with pytest.raises(SystemExit, match="two pictures are called b"):
        tables.pictures_of(tmp_path)
    with pytest.raises(SystemExit, match="holds no pictures"):
        tables.pictures_of(tmp_path / "none")


class FakeServer:
    """Counts uploads and runs; answers as Save Features and Save Image do."""

    def __init__(self, base):
        self.base, self.graphs = base, []

    def upload(self, image, name=None):
        return name

    def run(self, graph, timeout):
        self.graphs.append(graph)
        if "save" in graph:
            name = f"{graph['save']['inputs']['filename_prefix']}_00001_.safetensors"
            target = self.base / "output" / "pastiche_features" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"")
            return SimpleNamespace(outputs={"save": {"text": [f"{name}: 1 kB"]}}, images=[])
        return SimpleNamespace(outputs={}, images=[{"filename": "x.png"}])

    def download(self, image, target):
        picture(target)


def test_every_picture_is_inverted_once_also_after_an_interruption(tables, tmp_path):
    settings = {"steps": "4"}
    first, table = picture(tmp_path / "in" / "ä photo.png"), tables.Table(tmp_path / "work", settings)
    server = FakeServer(table.base)

    def graph(name, prefix):
        return {"save": tables.node("PasticheSaveFeatures", filename_prefix=prefix)}

    name = table.invert(server, "cnt", first, graph)
    assert name.isascii() and name.startswith("cnt_") and table.invert(server, "cnt", first, graph) == name
    again = tables.Table(tmp_path / "work", settings)
    assert again.invert(server, "cnt", first, graph) == name and len(server.graphs) == 1
    assert again.invert(server, "sty", first, graph) != name
    (table.base / "output" / "pastiche_features" / name).unlink()
    again.invert(server, "cnt", first, graph)
    assert len(server.graphs) == 3
    with pytest.raises(SystemExit, match=r"other settings \(steps\)"):
        tables.Table(tmp_path / "work", {"steps": "5"})
    assert not again.complete(["a"])
    for _ in range(2):
        again.picture(server, "a", {})
    assert again.complete(["a"]) and len(server.graphs) == 4


def test_pairs_share_the_inversions_of_their_pictures(tables, tmp_path):
    """A picture that is content and style is inverted for both."""
    a, b, c = (picture(tmp_path / "in" / f"{name}.png") for name in "abc")
    table = tables.Table(tmp_path / "work", {})
    server = FakeServer(table.base)
    found = table.invert_all(server, ("cnt", "sty"), [(a, b), (a, c), (b, c)], lambda name, prefix: {
        "save": tables.node("PasticheSaveFeatures", filename_prefix=prefix)})
    assert len(server.graphs) == 4 and len(set(found)) == 3
    stems = [tuple(name.split("_")[:2]) for pair in found for name in pair]
    assert [(role, stem[0]) for role, stem in stems] == [("cnt", "a"), ("sty", "b"), ("cnt", "a"), ("sty", "c"), ("cnt", "b"), ("sty", "c")]


@pytest.mark.parametrize("weights", ["random", "folder"])
def test_a_table_says_how_it_was_made(tables, tmp_path, capsys, weights):
    options = SimpleNamespace(weights=weights, size=64, steps=4, table=tmp_path / "new" / "table.md")
    assert tables.write_table(options, "/x/styleid_table.py", "Title" + tables.random_note(options), "gamma 0.5", ["| a |", "|---|"]) == 0
    lines = options.table.read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines
    assert lines[0] == ("# Title (random networks)" if weights == "random" else "# Title")
    assert (tables.PLUMBING in lines) == (weights == "random")
    assert lines[-4:] == ["64 px, 4 steps, gamma 0.5; see benchmarks/styleid_table.py for the measures.", "", "| a |", "|---|"]


def test_pictures_are_cut_as_the_graph_cuts_them(tables, tmp_path):
    wide = Image.new("RGB", (12, 4))
    wide.paste((255, 0, 0), (4, 0, 8, 4))
    wide.save(tmp_path / "wide.png")
    found = tables.load_picture(tmp_path / "wide.png", 4)
    assert found.shape == (3, 4, 4) and found[0].min() == 1 and found[1:].max() == 0


@pytest.mark.parametrize("name, arguments", [
    ("styleid_table", ["--checkpoint", "model.safetensors", "--data", "d", "--weights", "w"]),
    ("styleid_table", ["--checkpoint", "mini", "--data", "d", "--weights", "w"]),
    ("injectfusion_table", ["--model", "model.safetensors", "--data", "d", "--weights", "w"]),
])
def test_graphs_name_nodes_and_inputs_that_exist(benchmark, tables, repository, name, arguments):
    """Links lead to nodes of the graph; classes and inputs are those of the shipped workflows or of our schemas."""
    script = benchmark(name)
    options = script.parse(arguments)
    loader = tables.checkpoint_loader(options.checkpoint) if name == "styleid_table" else tables.unconditional_loader("model")
    streams = "self_attention" if name == "styleid_table" else "h_space"
    graphs = [tables.inversion_graph(loader, "p.png", 64, 4, "normal", streams, "auto", "x"), script.pair_graph(loader, "a", "b", options)]
    assert json.loads(json.dumps(graphs)) == graphs
    known = {}
    for path in (repository / "workflows" / "api").glob("*.json"):
        for entry in json.loads(path.read_text()).values():
            known.setdefault(entry["class_type"], set()).update(entry["inputs"])
    known |= {"PasticheSaveFeatures": {"features", "filename_prefix"}, "PasticheLoadFeatures": {"file", "model", "memory"}}
    for graph in graphs:
        for entry in graph.values():
            assert set(entry["inputs"]) <= known.get(entry["class_type"], {"image"}), entry["class_type"]
            for value in entry["inputs"].values():
                assert not isinstance(value, list) or value[0] in graph
    assert script.name_of(tables.Path("a/x.jpg"), tables.Path("b/y.png")) in ("x_stylized_y", "x_injected_y")


def test_wrong_arguments_are_sentences(benchmark, tmp_path, capsys):
    for name, model in (("styleid_table", "--checkpoint"), ("injectfusion_table", "--model")):
        script = benchmark(name)
        assert script.main([model, str(tmp_path / "none"), "--data", str(tmp_path), "--weights", "random"]) == 2
        assert model in capsys.readouterr().err
        there = picture(tmp_path / "there.png")
        assert script.main([model, str(there), "--data", str(tmp_path), "--weights", str(tmp_path / "none")]) == 2
        assert "--weights" in capsys.readouterr().err
