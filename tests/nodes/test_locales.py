"""Translations: English is what the schemas say; simplified Chinese names and explains every node, input and output, and nothing else."""

import asyncio
import json
import re

import pytest

from pastiche.nodes.extension import PasticheExtension

HAN = re.compile(r"[一-鿿]")


@pytest.fixture(scope="module")
def schemas():
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(PasticheExtension().get_node_list())}


@pytest.fixture(scope="module")
def chinese(repository):
    return json.loads((repository / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


def test_every_node_is_translated(schemas, chinese):
    assert sorted(chinese) == sorted(schemas)
    for name, node in chinese.items():
        assert HAN.search(node["description"]) and node["display_name"], name


def test_every_input_and_output_has_its_name(schemas, chinese):
    """Otherwise add it to locales/zh/nodeDefs.json."""
    for name, schema in schemas.items():
        assert {i.id for i in schema.inputs} == set(chinese[name]["inputs"]), name
        assert [str(k) for k in range(len(schema.outputs))] == list(chinese[name]["outputs"]), name
        for part in [*chinese[name]["inputs"].values(), *chinese[name]["outputs"].values()]:
            assert part["name"], name


def parts(schema, chinese):
    """(place, the schema's part, its translation) of every input and output."""
    words = chinese[schema.node_id]
    yield from ((f"{schema.node_id}.{part.id}", part, words["inputs"][part.id]) for part in schema.inputs)
    yield from ((f"{schema.node_id} output {k}", part, words["outputs"][str(k)]) for k, part in enumerate(schema.outputs))


def test_every_input_and_output_is_explained(schemas, chinese):
    missing = [place for schema in schemas.values() for place, _, words in parts(schema, chinese) if not HAN.search(words.get("tooltip", ""))]
    assert missing == []


def test_choices_are_explained_in_both_languages(schemas, chinese):
    """The front end shows a combo's choices untranslated: what the English tooltip says of a choice, the Chinese says too."""
    def says(text, choice):
        return re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.ASCII)

    told = [
        (f"{place}: {choice}", says(words["tooltip"], choice))
        for schema in schemas.values() for place, part, words in parts(schema, chinese)
        for choice in getattr(part, "options", None) or () if says(part.tooltip, choice)
    ]
    assert len(told) > 30 and [place for place, found in told if not found] == []


def test_quoted_values_are_the_same(schemas, chinese):
    """What is to be typed as it stands is not translated and not forgotten."""
    for schema in schemas.values():
        for place, part, words in parts(schema, chinese):
            for quoted in re.findall(r'"[^"]+"', part.tooltip):
                if quoted != '"custom"':
                    assert quoted in words["tooltip"], place


def test_categories_are_translated(schemas, repository):
    """Every folder of the node library; `loaders` and `mask` are ComfyUI's own words."""
    names = {name for schema in schemas.values() for name in schema.category.split("/")} - {"loaders", "mask"}
    for language in ("en", "zh"):
        main = json.loads((repository / "locales" / language / "main.json").read_text(encoding="utf-8"))
        assert set(main["nodeCategories"]) == names, language


def test_one_word_for_one_input(chinese):
    """The same input is called the same on every node."""
    words = {}
    for node in chinese.values():
        for key, value in node["inputs"].items():
            words.setdefault(key, set()).add(value["name"])
    assert {key: names for key, names in words.items() if len(names) > 1} == {}


def test_languages_have_the_same_main_keys(repository):
    def keys(tree, path=()):
        return {p for key, value in tree.items() for p in (keys(value, (*path, key)) if isinstance(value, dict) else {(*path, key)})}

    english, chinese = (json.loads((repository / "locales" / language / "main.json").read_text(encoding="utf-8")) for language in ("en", "zh"))
    assert keys(english) <= keys(chinese)


def test_what_widgets_say_is_translated(repository):
    """Every text that js/ says stands in js/texts.js in Chinese, and nothing else does."""
    table = re.search(r"const CHINESE = \{(.*?)\n\};", (repository / "js" / "texts.js").read_text(encoding="utf-8"), re.DOTALL)[1]
    chinese = dict(re.findall(r'"((?:[^"\\]|\\.)*)":\s*"((?:[^"\\]|\\.)*)"', table))
    assert len(chinese) > 20 and all(HAN.search(text) for text in chinese.values())
    for english, text in chinese.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", text)), english
    code = {path.name: path.read_text(encoding="utf-8") for path in (repository / "js").glob("*.js")}
    said = {text for source in code.values() for call in re.findall(r'\bsay\(((?:"[^"]*"|[^",()])*)', source) for text in re.findall(r'"([^"]+)"', call)}
    view = code["fastsam_view.js"]
    said |= set(re.findall(r'^  \["\w+", "[^"]+", "([^"]+)"\],$', view, re.MULTILINE)) | set(re.findall(r'const HELP =\s*"([^"]+)"', view)) | {"Fit"}
    assert said == set(chinese)
