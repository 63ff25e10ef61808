"""Labelled sheets for README and the help pages: what a running ComfyUI draws with the mini model at several settings.

tools/make_pictures.py makes them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

from pastiche_client import ComfyUI, Graph, load
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, MARGIN, CAPTION = (252, 180), 6, 24  # pixels
SIZE, STEPS = 256, 12
Cell = tuple[str, Image.Image]


# ---- graphs ----------------------------------------------------------------------------------------


def small(name: str, **pictures: str) -> Graph:
    """A shipped graph at SIZE and STEPS; `pictures`: samples by the beginning of a Sample Picture's title, in lower case."""
    graph = load(name)
    for title, inputs in graph.titles.items():
        if "largest_size" in inputs:
            graph.set(title, largest_size=SIZE)
        if "scheduler" in inputs:
            graph.set(title, steps=STEPS)
        if "learning_rate" in inputs and STEPS < 10:  # a preview
            graph.set(title, steps=STEPS)
        for start, picture in pictures.items():
            if "picture" in inputs and title.lower().startswith(start):
                graph.set(title, picture=picture)
    return graph


def node(graph: Graph, title: str) -> list:
    """The link to the first output of the node of this title."""
    return [next(key for key, entry in graph.items() if entry["_meta"]["title"] == title), 0]


def add(graph: Graph, title: str, class_type: str, **inputs: Any) -> list:
    key = str(max(map(int, graph)) + 1)
    graph[key] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
    return [key, 0]


def run(comfy: ComfyUI, graph: Graph, image: list | None = None) -> Image.Image:
    """What reaches the link `image`, which nothing need show yet; left out, the picture saved as "Result"."""
    if image is not None:
        graph = Graph({key: entry for key, entry in graph.items() if key in _upstream(graph, image[0])})
        key = add(graph, "Shown", "PreviewImage", images=image)[0]
    else:
        key = node(graph, "Result")[0]
    found = next(found for found in comfy.run(graph).images if found["node"] == key)
    return Image.open(io.BytesIO(comfy.fetch(found))).convert("RGB")


def _upstream(graph: Graph, key: str) -> set[str]:
    feeding = {value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)}
    return {key}.union(*(_upstream(graph, other) for other in feeding))


def photo(graph: Graph, comfy: ComfyUI, title: str) -> Cell:
    """What a Sample Picture of the graph shows, as it enters the model."""
    return title.partition(":")[0].lower(), run(comfy, graph, node(graph, title))


# ---- sheets ----------------------------------------------------------------------------------------


def sheet(rows: list[list[Cell]], cell: tuple[int, int] = CELL) -> Image.Image:
    """Captioned pictures in rows, each filling its cell."""
    width, height = cell
    size = (MARGIN + max(len(row) for row in rows) * (width + MARGIN), MARGIN + len(rows) * (height + CAPTION + MARGIN))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for row, y in zip(rows, itertools.count(MARGIN, height + CAPTION + MARGIN)):
        for (caption, picture), x in zip(row, itertools.count(MARGIN, width + MARGIN)):
            page.paste(ImageOps.fit(picture, cell, Image.Resampling.LANCZOS), (x, y))
            draw.text((x + width / 2, y + height + CAPTION / 2), caption, "black", font, anchor="mm")
    return page


def dial(comfy: ComfyUI, graph: Graph, title: str, name: str, values: list, image: list | None = None, caption: str = "") -> list[Cell]:
    """A row of one input at several settings."""
    row = []
    for value in values:
        graph.set(title, **{name: value})
        row.append((caption or f"{name} {value}".replace("_", " "), run(comfy, graph, image)))
    return row


def sweep(comfy: ComfyUI, graph: Graph, down: tuple[str, str, list], across: tuple[str, str, list], given: tuple[str, ...]) -> Image.Image:
    """A sheet of a graph over two dials, each (title, input, values), below the pictures of the titles `given`."""
    rows = [[photo(graph, comfy, title) for title in given]]
    for value in down[2]:
        graph.set(down[0], **{down[1]: value})
        rows.append([(f"{down[1]} {value}, {caption}", picture) for caption, picture in dial(comfy, graph, *across)])
    return sheet(rows)


def styleid(comfy: ComfyUI) -> Image.Image:
    dials = ("Style injection", "gamma", [0.9, 0.3]), ("Style injection", "temperature", [0.5, 1.5, 5.0])
    return sweep(comfy, small("styleid_mini", style="woodcut"), *dials, ("Content", "Style"))


def injectfusion(comfy: ComfyUI) -> Image.Image:
    dials = ("Inject content", "gamma", [0.2, 0.5, 0.8]), ("Calibrated sampler", "omega", [0.0, 0.3, 0.7])
    return sweep(comfy, small("injectfusion_mini"), *dials, ("Content: what is injected", "Original: gives the look"))


def adain(comfy: ComfyUI) -> Image.Image:
    """The tones alone: Style Injection is off."""
    graph = small("styleid_mini")
    graph.set("Style injection", strength=0.0)
    return sheet([[photo(graph, comfy, "Content"), photo(graph, comfy, "Style")],
                  dial(comfy, graph, "Content in the style's tones", "strength", [0.0, 0.5, 1.0])])


def _reports(comfy: ComfyUI, settings: list[tuple[str, dict, dict]]) -> list[list[Image.Image]]:
    """[original, reconstruction, difference] of each (caption, inversion's inputs, report's inputs)."""
    found = []
    for _, inversion, report in settings:
        graph = small("styleid_mini")
        graph.set("Invert content", **{key: value for key, value in inversion.items()})
        model, vae = node(graph, "Mini model"), [node(graph, "Mini model")[0], 1]
        sampler = {"sampler": add(graph, "Midpoint", "PasticheMidpointSampler")} if report.pop("midpoint", False) else {}
        link = add(graph, "Report", "PasticheInversionReport", model=model, vae=vae, trajectory=[node(graph, "Invert content")[0], 1], **report, **sampler)
        picture = run(comfy, graph, link)
        third = picture.width // 3
        found.append([picture.crop((third * k, 0, third * (k + 1), picture.height)) for k in range(3)])
    return found


def inversion(comfy: ComfyUI) -> Image.Image:
    """Three schemes: what comes back, and how far off it is."""
    schemes = ["next", "predicted", "fixed_point"]
    found = _reports(comfy, [("", {"scheme": scheme}, {"amplify": 16.0}) for scheme in schemes])
    return sheet([[(scheme, pictures[1]) for scheme, pictures in zip(schemes, found)],
                  [("difference to the photo x 16", pictures[2]) for pictures in found]])


def inversion_report(comfy: ComfyUI) -> Image.Image:
    found = _reports(comfy, [("", {"scheme": "next"}, {"amplify": value}) for value in (2.0, 8.0, 32.0)])
    return sheet([[("original", found[0][0]), ("reconstruction", found[0][1])],
                  [(f"difference, amplify {value}", pictures[2]) for value, pictures in zip((2, 8, 32), found)]])


def midpoint(comfy: ComfyUI) -> Image.Image:
    found = _reports(comfy, [("", {"scheme": "midpoint"}, {"amplify": 16.0, "midpoint": True}), ("", {"scheme": "midpoint"}, {"amplify": 16.0})])
    return sheet([[("photo", found[0][0]), ("Midpoint Sampler", found[0][1]), ("euler: not what was inverted", found[1][1])],
                  [("", Image.new("RGB", CELL, "white")), ("difference x 16", found[0][2]), ("difference x 16", found[1][2])]])


def ddim_sampler(comfy: ComfyUI) -> Image.Image:
    """Steps left out at the start, in StyleID."""
    graph = small("styleid_mini")
    link = add(graph, "DDIM", "PasticheDDIMSampler", clean_level="sigma 0", skip_steps=0)
    graph[node(graph, "Sample")[0]]["inputs"]["sampler"] = link
    return sheet([dial(comfy, graph, "DDIM", "skip_steps", [0, 2, 5])])


def style_reference_transformer(comfy: ComfyUI) -> Image.Image:
    """On the mini transformer, photo and style inverted."""
    graph, title = small("restyle_transformer_mini", my="coffee", style="impasto"), "The style picture runs beside the sample"
    graph.set("Picture size", largest_size=384)
    rows = [[photo(graph, comfy, "My picture"), photo(graph, comfy, "Style")]]
    for share in ("join", "replace"):
        graph.set(title, share=share)
        rows.append([(f"{share}, {caption}", picture) for caption, picture in dial(comfy, graph, title, "preset", ["plain", "balanced", "more style"])])
    return sheet(rows)


def styles(comfy: ComfyUI) -> Image.Image:
    """README's first picture: two photos in three styles on the mini transformer, all as its template has it."""
    rows = []
    for content, size in (("astronaut", 256), ("coffee", 384)):
        row = []
        for style in ("stained glass", "impasto", "woodcut"):
            graph = small("restyle_transformer_mini", my=content, style=style)
            graph.set("Picture size", largest_size=size)
            row.append((f"{content}, {style}", run(comfy, graph)))
            if not rows:
                rows.append([("photos and styles", Image.new("RGB", CELL, "white"))])
            if len(rows[0]) < 4:
                rows[0].append((style, run(comfy, graph, node(graph, "Style"))))
        rows.append([(content, run(comfy, graph, node(graph, "My picture"))), *row])
    return sheet(rows, (216, 216))


def feature_pca(comfy: ComfyUI) -> Image.Image:
    """At 512 pixels: a layer has a value every 8 to 32 of them."""
    graph = small("styleid_mini", content="astronaut")
    graph.set("Content size", largest_size=2 * SIZE)
    graph.set("Invert content", streams="residual", layers="6-11")
    shown = add(graph, "PCA", "PasticheFeaturePCA", features=[node(graph, "Invert content")[0], 3], layer="output 7", percent=0.8, size=512)
    cells = dial(comfy, graph, "PCA", "layer", ["output 6", "output 8", "output 11"], shown)
    return sheet([[photo(graph, comfy, "Content"), *cells]], (186, 186))


def style_library(comfy: ComfyUI) -> Image.Image:
    """Styles saved once, each then loaded for the photo: nothing of them is inverted again."""
    rows: list[list[Cell]] = [[], []]
    for style in ("impasto", "woodcut", "stained glass"):
        graph = small("styleid_mini", style=style)
        rows[0].append((f"{style}, saved", run(comfy, graph, node(graph, "Style"))))
        name = style.replace(" ", "_")
        add(graph, "Save", "PasticheSaveFeatures", features=[node(graph, "Invert style")[0], 3], filename_prefix=name)
        comfy.run(graph)
        file = comfy.object_info()["PasticheLoadFeatures"]["input"]["required"]["file"]
        options = file[1]["options"] if isinstance(file[0], str) else file[0]
        again = small("styleid_mini", style=style)
        saved = max(option for option in options if option.startswith(name))  # the newest
        loaded = add(again, "Load", "PasticheLoadFeatures", file=saved, model=node(again, "Mini model"), memory="ram")[0]
        again[node(again, "Style injection")[0]]["inputs"]["style"] = [loaded, 0]
        again[node(again, "Content in the style's tones")[0]]["inputs"]["style"] = [loaded, 2]
        rows[1].append(("loaded for a photo", run(comfy, again)))
    return sheet(rows)


def style_similarity(comfy: ComfyUI) -> Image.Image:
    graph = small("styleid_mini")
    shown = add(graph, "Map", "PasticheStyleSimilarity", content=[node(graph, "Invert content")[0], 3], style=[node(graph, "Invert style")[0], 3],
                content_image=node(graph, "Content size"), style_image=node(graph, "Style size"), layer="output 9", percent=0.6, x=0.5, y=0.5)
    rows = []
    for x, y in ((0.45, 0.35), (0.12, 0.2), (0.7, 0.85)):
        graph.set("Map", x=x, y=y)
        rows.append([(f"x {x}, y {y}", run(comfy, graph, shown))])
    return sheet(rows, (2 * CELL[0], CELL[1]))


def mini(comfy: ComfyUI) -> Image.Image:
    """What both networks give back of a photo that was inverted."""
    rows = []
    for content in ("astronaut", "dandelion"):
        graph = small("styleid_mini", content=content)
        graph.set("Invert content", memory="recompute")  # no features, which the transformer has not
        row = [(f"photo: {content}", run(comfy, graph, node(graph, "Content")))]
        for architecture, scheduler in (("unet", "normal"), ("transformer", "simple")):
            graph[node(graph, "Mini model")[0]]["inputs"]["architecture"] = architecture
            graph.set("Schedule", scheduler=scheduler)
            key = node(graph, "Mini model")[0]
            report = add(graph, architecture, "PasticheInversionReport", model=[key, 0], vae=[key, 1], trajectory=[node(graph, "Invert content")[0], 1], amplify=1.0)
            three = run(comfy, graph, report)
            drawn = three.crop((three.width // 3, 0, 2 * three.width // 3, three.height))
            row.append((f"{architecture}: to noise and back", drawn))
        rows.append(row)
    return sheet(rows)


def samples(comfy: ComfyUI) -> Image.Image:
    names = comfy.object_info()["PasticheSamplePicture"]["input"]["required"]["picture"]
    options = names[1]["options"] if isinstance(names[0], str) else names[0]
    graph = Graph()
    graph["1"] = {"class_type": "PasticheSamplePicture", "inputs": {"picture": ""}, "_meta": {"title": "Sample"}}
    found = [(name, dial(comfy, graph, "Sample", "picture", [name], ["1", 0])[0][1]) for name in options]
    return sheet([found[:4], found[4:]], (186, 140))


def lora_strength(comfy: ComfyUI) -> Image.Image:
    return sheet([dial(comfy, small("diffstyler_train_mini"), "Use it at once", "strength_model", [0.0, 0.6, 1.2])])


def feature_injection(comfy: ComfyUI) -> Image.Image:
    """How many steps the content's features hold; without the mask, so that all of the picture is redrawn."""
    graph, row = small("diffstyler_mini"), []
    graph[node(graph, "Sample")[0]]["inputs"]["model"] = node(graph, "Keep the content's structure")
    for share in (0.0, 0.3, 0.7):
        graph.set("Keep the content's structure", feature_steps=share, attention_steps=share)
        row.append((f"feature and attention steps {share}", run(comfy, graph)))
    return sheet([row])


def keep_outside(comfy: ComfyUI) -> Image.Image:
    graph = small("diffstyler_mini")
    without = Graph({key: {**entry, "inputs": dict(entry["inputs"])} for key, entry in graph.items()})
    without[node(without, "Sample")[0]]["inputs"]["model"] = node(without, "Keep the content's structure")
    mask = add(graph, "The mask", "MaskToImage", mask=[node(graph, "Content")[0], 1])
    return sheet([[("the mask", run(comfy, graph, mask)), ("without", run(comfy, without)), ("with Keep Outside Mask", run(comfy, graph))]])


def multistyle(comfy: ComfyUI) -> Image.Image:
    graph, row = small("diffstyler_multistyle_mini"), []
    for left, right in ((2.0, 0.0), (0.0, 2.0), (2.0, 2.0)):
        graph.set("Style left: where and how much", strength=left)
        graph.set("Style right: where and how much", strength=right)
        row.append((f"strength {left} left, {right} right", run(comfy, graph)))
    return sheet([[photo(graph, comfy, "Style left"), photo(graph, comfy, "Style right")], row])


def style_entry(comfy: ComfyUI) -> Image.Image:
    return sheet([dial(comfy, small("diffstyler_multistyle_mini"), "Style left: where and how much", "strength", [0.0, 1.0, 2.0])])


def fastsam(comfy: ComfyUI) -> Image.Image:
    graph, row = load("fastsam_localized_style_mini"), []
    title = "Pick the objects to restyle"
    graph.set("Content size", largest_size=512)
    overlay = [node(graph, title)[0], 1]
    points = graph.titles[title]["points"]
    for caption, inputs in (
        ("everything", {"mode": "everything"}), ("two points, one left out", {"mode": "points", "points": points}), ("the largest", {"mode": "largest"}),
    ):
        graph.set(title, **inputs)
        row.append((caption, run(comfy, graph, overlay)))
    return sheet([row], (252, 252))


def methods(comfy: ComfyUI) -> Image.Image:
    """One photo, one painting, each method as its template is shipped."""
    pictures = {"content": "coffee", "style": "impasto", "original": "impasto", "my": "coffee"}
    graph = small("styleid_mini", **pictures)
    drawn = [(caption, run(comfy, small(name, **pictures))) for caption, name in (
        ("InjectFusion", "injectfusion_mini"), ("DiffStyler, the cup", "diffstyler_mini"), ("Style Reference", "style_reference_mini"))]
    return sheet([[photo(graph, comfy, "Content"), photo(graph, comfy, "Style"), ("StyleID", run(comfy, graph))], drawn])


SHEETS: dict[str, Callable[[ComfyUI], Image.Image]] = {
    function.__name__: function for function in (
        methods, styles, styleid, adain, injectfusion, inversion, inversion_report, midpoint, ddim_sampler, style_reference_transformer, feature_pca,
        style_library, style_similarity, mini, samples, lora_strength, feature_injection, keep_outside, multistyle, style_entry, fastsam)
}
