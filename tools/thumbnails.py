"""Thumbnails of the templates from what their graphs give: the result large, content and style small in its corner."""

from __future__ import annotations

import io
import json
from pathlib import Path

from host.comfy import Server
from host.environment import ROOT
from host.files import atomic_write
from PIL import Image, ImageOps
from templates import TEMPLATES, Template

SIZE, INSET, EDGE = 512, 150, 6
PICTURE = {"PasticheStyleLibrary": 4}  # the output that is a picture, where it is not the first
RESULTS = ROOT / ".environment" / "artifacts" / "results"


def run(server: Server, template: Template, prompt: dict) -> dict[str, Path]:
    """Runs the graph as it is shipped and keeps the pictures named in `template.shown`; path by title."""
    prompt = json.loads(json.dumps(prompt))
    keys = {node["_meta"]["title"]: key for key, node in prompt.items()}
    for title in dict.fromkeys(template.shown[:2]):
        prompt[f"shown {title}"] = {"class_type": "PreviewImage", "inputs": {"images": [keys[title], PICTURE.get(prompt[keys[title]]["class_type"], 0)]}, "_meta": {"title": title}}
        keys[title] = f"shown {title}"
    result = server.run(prompt)
    found = {}
    for title in template.shown:
        image = next(image for image in result.images if image["node"] == keys[title])
        found[title] = server.download(image, RESULTS / template.api / f"{template.shown.index(title)}.png")
    return found


def compose(template: Template, pictures: list[Image.Image]) -> Image.Image:
    """(content, style, result) as one square picture."""
    content, style, result = pictures
    sheet = ImageOps.fit(result.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
    insets = [content, style]
    if template.shown and template.shown[0] == template.shown[1]:  # nothing but a style went in
        insets = insets[1:]
    for number, picture in enumerate(insets):
        square = ImageOps.fit(picture.convert("RGB"), (INSET, INSET), Image.Resampling.LANCZOS)
        inset = ImageOps.expand(square, EDGE, "white")
        sheet.paste(inset, (EDGE * 2 + number * (INSET + 3 * EDGE), SIZE - INSET - 4 * EDGE))
    return sheet


def make(server: Server, template: Template, prompt: dict) -> None:
    """Runs the graph of a mini template and writes its thumbnail, and that of its sister for a checkpoint."""
    run(server, template, prompt)
    write(template)
    result = next(key for key, node in prompt.items() if node["_meta"]["title"] == template.shown[2])
    for drawn in dict.fromkeys(sister.drawn for sister in TEMPLATES if sister.pictured_by == template.api and sister.drawn):
        content, style, size = drawn
        other = json.loads(json.dumps(prompt))
        for entry in other.values():
            title, inputs = entry["_meta"]["title"], entry["inputs"]
            if "picture" in inputs:
                inputs["picture"] = style if title == "Style" else content
            if title == "Picture size":
                inputs["largest_size"] = size
        image = next(image for image in server.run(other).images if image["node"] == result)
        server.download(image, RESULTS / template.api / "2.png")
        for number, name in enumerate((f"content_{content}.jpg", f"style_{style}.png")):
            Image.open(ROOT / "assets" / "samples" / name).save(RESULTS / template.api / f"{number}.png")
        write(template, drawn)


def write(template: Template, drawn: tuple[str, str, int] | None = None) -> None:
    """The thumbnail from the pictures that `run` has kept; the same for the template of that method with a checkpoint.

    With `drawn`: that of the templates with this choice of pictures.
    """
    numbers = [template.shown.index(title) for title in template.shown]
    pictures = [Image.open(io.BytesIO((RESULTS / template.api / f"{number}.png").read_bytes())) for number in numbers]
    sheet = compose(template, pictures)
    for sister in TEMPLATES:
        if drawn:
            mine = sister.pictured_by == template.api and sister.drawn == drawn
        else:
            method = template.api.removesuffix("_mini")
            mine = sister is template or sister.pictured_by == template.api and not sister.drawn or sister.api in (method, f"{method}_unconditional")
        if mine:
            target = ROOT / "workflows" / f"{sister.file}.jpg"
            with atomic_write(target) as part:
                sheet.save(part, "JPEG", quality=88)
