"""tools/templates.py against the files: every graph has its template, its thumbnail and, where it needs one, its download."""

import json
import re

import pytest
import templates
from PIL import Image
from support.live import API_WORKFLOWS, ROOT

FOLDER = ROOT / "workflows"
FOLDERS = {
    "CheckpointLoaderSimple": ["checkpoints"], "PasticheLoadFastSAM": ["fastsam"], "PasticheLoadUnconditional": ["diffusers"],
    "UNETLoader": ["diffusion_models"], "VAELoader": ["vae"], "CLIPLoader": ["text_encoders"], "DualCLIPLoader": ["text_encoders"],
}


def nodes(template):
    workflow = json.loads((FOLDER / f"{template.file}.json").read_text(encoding="utf-8"))
    return workflow["nodes"] + [node for graph in (workflow.get("definitions") or {}).get("subgraphs", []) for node in graph["nodes"]]


def test_every_graph_has_one_template_and_no_file_is_left_over():
    assert sorted(t.api for t in templates.TEMPLATES) == [path.stem for path in API_WORKFLOWS]
    assert sorted(t.file for t in templates.TEMPLATES) == sorted(path.stem for path in FOLDER.glob("*.json"))
    assert {path.stem for path in FOLDER.glob("*.jpg")} == {t.file for t in templates.TEMPLATES}


def test_names_sort_in_the_order_of_learning():
    assert [t.file for t in templates.TEMPLATES] == sorted(t.file for t in templates.TEMPLATES)


@pytest.mark.parametrize("template", templates.TEMPLATES, ids=lambda template: template.api)
def test_workflow_has_note_groups_and_no_file_of_the_users(template):
    workflow = json.loads((FOLDER / f"{template.file}.json").read_text(encoding="utf-8"))
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and "Change first" in notes[0]["widgets_values"][0]
    assert len(workflow["groups"]) >= 3 and workflow["groups"][0]["title"] == "1 Pictures"
    assert not [node["type"] for node in nodes(template) if node["type"].startswith("LoadImage")]
    assert any(node["type"] == "PasticheCompare" for node in nodes(template)) == ("sweep" not in template.api)


@pytest.mark.parametrize("template", [t for t in templates.TEMPLATES if not t.mini], ids=lambda template: template.api)
def test_models_say_where_they_come_from(template):
    loaders = [node for node in nodes(template) if node["properties"].get("models")]
    assert loaders
    for node in loaders:
        named = [value for value in node["widgets_values"] if str(value).endswith((".safetensors", ".pt")) or value in templates.MODELS]
        assert [model["name"] for model in node["properties"]["models"]] == named
        for model in node["properties"]["models"]:
            assert set(model) == {"name", "directory", "url"} and re.match(r"https://(huggingface\.co|github\.com)/[^ ?]+$", model["url"])
            file = model["url"].rpartition("/")[2]
            assert file == model["name"] or f"/{model['name']}/" in model["url"], "what is downloaded has another name"
            assert model["directory"] in FOLDERS[node["type"]]
    files = [value for node in nodes(template) for value in node.get("widgets_values") or [] if str(value).endswith((".safetensors", ".pt"))]
    assert set(files) <= set(templates.MODELS)


def test_thumbnails_tell_templates_apart():
    """Their photos and styles differ; the sheet, the LoRA and the mask are told by what they show."""
    pairs = {}
    for template in templates.TEMPLATES:
        if template.mini:
            graph = json.loads((FOLDER / "api" / f"{template.api}.json").read_text(encoding="utf-8"))
            titles = {entry["_meta"]["title"]: entry["inputs"].get("picture") for entry in graph.values()}
            pairs[template.api] = tuple(titles[title] for title in template.shown[:2])
    of_methods = [pairs[api] for api in ("quick_start_mini", "styleid_mini", "injectfusion_mini", "fastsam_localized_style_mini", "style_reference_mini")]
    assert len(set(of_methods)) == len(of_methods), pairs


@pytest.mark.parametrize("template", templates.TEMPLATES, ids=lambda template: template.api)
def test_thumbnail_is_square_enough(template):
    with Image.open(FOLDER / f"{template.file}.jpg") as image:
        assert image.format == "JPEG" and 256 <= min(image.size) and max(image.size) <= 800
        assert 0.8 <= image.width / image.height <= 1.25
