"""Nodes in ComfyUI's own front end, rightly wired, for the help pages; tools/make_pictures.py makes them."""

from __future__ import annotations

import io
import time
from typing import Any

from PIL import Image


def _entry(class_type: str, title: str = "", **inputs: Any) -> dict:
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


_MODEL = {"1": _entry("PasticheLoadMini", kind="empty")}
# name: (graph, columns of (id, width, height), whether it is run first)
CANVASES: dict[str, tuple[dict, list[list[tuple[str, int, int]]], bool]] = {
    "mini_wiring": ({
        **_MODEL, "2": _entry("PasticheSamplePicture", picture="dandelion"), "3": _entry("VAEEncode", pixels=["2", 0], vae=["1", 1]),
        "4": _entry("BasicScheduler", model=["1", 0], scheduler="normal", steps=20, denoise=1.0),
        "5": _entry("PasticheDDIMInversion", model=["1", 0], positive=["1", 2], latent=["3", 0], sigmas=["4", 0], scheme="predicted", iterations=3, substeps=1),
    }, [[("1", 260, 0), ("2", 260, 300)], [("4", 240, 0), ("3", 200, 0)], [("5", 300, 0)]], False),
    "features_library": ({
        **_MODEL, "2": _entry("PasticheCaptureFeatures", streams="self_attention", layers="6-11", memory="ram", precision="half", model=["1", 0]),
        "3": _entry("PasticheSaveFeatures", features=["2", 0], filename_prefix="impasto"),
        "4": _entry("PasticheLoadFeatures", "Load Features: another day, no inversion", file="impasto_00001_.safetensors", model=["1", 0], memory="ram"),
        "5": _entry("PasticheStyleInjection", model=["1", 0], style=["4", 0], gamma=0.75, temperature=1.5, strength=1.0, layers="6-11",
                    start_percent=0.0, end_percent=1.0),
    }, [[("1", 240, 0)], [("2", 280, 0), ("4", 340, 0)], [("3", 260, 0), ("5", 280, 0)]], False),
    "style_gallery": ({
        **_MODEL, "2": _entry("BasicScheduler", model=["1", 0], scheduler="normal", steps=20, denoise=1.0),
        "3": _entry("PasticheStyleLibrary", style="ready/watercolour", model=["1", 0], memory="ram", vae=["1", 1], sigmas=["2", 0], positive=["1", 2], size=256,
                    streams="self_attention", layers="6-11"),
        "4": _entry("PasticheStyleInjection", model=["1", 0], style=["3", 0], gamma=0.75, temperature=1.5, strength=1.0, layers="6-11"),
        "5": _entry("PasticheLatentAdaIN", "Latent AdaIN: style is the library's noise", style=["3", 2], strength=1.0),
    }, [[("1", 230, 0), ("2", 230, 0)], [("3", 520, 700)], [("4", 280, 0), ("5", 320, 0)]], False),
    "unconditional_wiring": ({
        "1": _entry("PasticheLoadUnconditional", folder="ddpm-church-256", weight_dtype="default", clip_denoised=False),
        "2": _entry("PasticheSamplePicture", picture="dandelion"), "3": _entry("VAEEncode", pixels=["2", 0], vae=["1", 1]),
        "4": _entry("BasicScheduler", model=["1", 0], scheduler="ddim_uniform", steps=40, denoise=1.0),
        "5": _entry("PasticheDDIMInversion", model=["1", 0], positive=["1", 2], latent=["3", 0], sigmas=["4", 0], scheme="predicted", iterations=3, substeps=1),
    }, [[("1", 380, 0), ("2", 260, 300)], [("4", 240, 0), ("3", 200, 0)], [("5", 300, 0)]], False),
    "fastsam_picker": ({
        "1": _entry("PasticheLoadFastSAM", model_name="pastiche mini (demo)"), "2": _entry("PasticheSamplePicture", picture="shapes"),
        "3": _entry("PasticheFastSAMPrompt", fastsam=["1", 0], image=["2", 0], boxes="", mode="auto", text="", merge=True, invert=False, grow=0, feather=0.0,
                    points='{"positive":[{"x":414,"y":417},{"x":252,"y":160}],"negative":[{"x":252,"y":276}],"size":[512,512]}'),
        "4": _entry("MaskPreview", mask=["3", 0]),
    }, [[("1", 280, 0), ("2", 280, 340)], [("3", 420, 860)], [("4", 260, 320)]], True),
    "styleid_wiring": ({
        **_MODEL, "2": _entry("BasicScheduler", model=["1", 0], scheduler="normal", steps=20, denoise=1.0),
        "3": _entry("PasticheDDIMInversion", "Invert content", model=["1", 0], positive=["1", 2], sigmas=["2", 0], memory="recompute"),
        "4": _entry("PasticheDDIMInversion", "Invert style", model=["1", 0], positive=["1", 2], sigmas=["2", 0], memory="recompute"),
        "5": _entry("PasticheCaptureFeatures", "Content features", model=["1", 0], trajectory=["3", 1], streams="self_attention", layers="6-11"),
        "6": _entry("PasticheCaptureFeatures", "Style features", model=["1", 0], trajectory=["4", 1], streams="self_attention", layers="6-11"),
        "7": _entry("PasticheLatentAdaIN", content=["3", 0], style=["4", 0], strength=1.0),
        "8": _entry("PasticheStyleInjection", model=["1", 0], content=["5", 0], style=["6", 0], layers="6-11"),
        "9": _entry("SamplerCustom", model=["8", 0], positive=["1", 2], negative=["1", 2], sigmas=["2", 0], latent_image=["7", 0], add_noise=False, cfg=1.0),
    }, [[("1", 230, 0), ("2", 230, 0)], [("3", 260, 0), ("4", 260, 0)], [("5", 260, 0), ("6", 260, 0), ("7", 260, 0)], [("8", 280, 0)], [("9", 280, 0)]], False),
    "inversion_wiring": ({
        **_MODEL, "2": _entry("BasicScheduler", model=["1", 0], scheduler="normal", steps=20, denoise=1.0),
        "3": _entry("PasticheDDIMInversion", model=["1", 0], positive=["1", 2], sigmas=["2", 0], scheme="midpoint"),
        "4": _entry("PasticheMidpointSampler", "Midpoint Sampler: for midpoint"),
        "5": _entry("PasticheDDIMSampler", "DDIM Sampler: for the others"),
        "6": _entry("PasticheInversionReport", model=["1", 0], trajectory=["3", 1], vae=["1", 1], sampler=["4", 0], amplify=8.0),
        "7": _entry("SamplerCustom", model=["1", 0], positive=["1", 2], negative=["1", 2], sampler=["4", 0], sigmas=["2", 0], latent_image=["3", 0],
                    add_noise=False, cfg=1.0),
    }, [[("1", 230, 0), ("2", 230, 0)], [("3", 270, 0), ("4", 330, 0), ("5", 330, 0)], [("6", 300, 0), ("7", 300, 0)]], False),
    "views_wiring": ({
        "1": _entry("PasticheSamplePicture", "Content", picture="dandelion"), "2": _entry("PasticheSamplePicture", "Style", picture="woodcut"),
        "3": _entry("PasticheCaptureFeatures", "Content features", streams="self_attention"),
        "4": _entry("PasticheCaptureFeatures", "Style features", streams="self_attention"),
        "5": _entry("PasticheFeaturePCA", features=["3", 0], compare=["4", 0], layer="output 7", percent=0.6),
        "6": _entry("PasticheStyleSimilarity", content=["3", 0], style=["4", 0], content_image=["1", 0], style_image=["2", 0], layer="output 7",
                    percent=0.6, x=0.5, y=0.5),
    }, [[("1", 240, 280), ("2", 240, 320)], [("3", 260, 0), ("4", 260, 0)], [("5", 280, 0), ("6", 280, 0)]], False),
    "style_reference_wiring": ({
        **_MODEL, "2": _entry("PasticheSamplePicture", "Style", picture="woodcut"), "3": _entry("VAEEncode", pixels=["2", 0], vae=["1", 1]),
        "4": _entry("PasticheStyleReference", model=["1", 0], style=["3", 0]),
        "5": _entry("SamplerCustom", model=["4", 0], positive=["1", 2], negative=["1", 2], add_noise=True, cfg=1.0),
    }, [[("1", 230, 0), ("2", 230, 300)], [("3", 200, 0)], [("4", 300, 0)], [("5", 280, 0)]], False),
    "diffstyler_wiring": ({
        **_MODEL, "2": _entry("PasticheSamplePicture", "Content and its mask", picture="coffee"),
        "3": _entry("PasticheDDIMInversion", "Invert content", model=["1", 0], positive=["1", 2]),
        "4": _entry("PasticheCaptureFeatures", "Content features, model without LoRA", model=["1", 0], trajectory=["3", 1],
                    streams="residual, self_attention_qk, cross_attention", layers="3-11"),
        "5": _entry("LoraModelLoader", "Style LoRA", model=["1", 0], strength_model=1.0),
        "6": _entry("PasticheFeatureInjection", model=["5", 0], content=["4", 0], feature_steps=0.6, attention_steps=0.5),
        "7": _entry("PasticheTrajectoryBlend", model=["6", 0], trajectory=["3", 1], mask=["2", 1]),
    }, [[("1", 230, 0), ("2", 230, 280)], [("3", 270, 0)], [("4", 320, 0), ("5", 320, 0)], [("6", 320, 0), ("7", 320, 0)]], False),
    "multistyle_wiring": ({
        **_MODEL, "2": _entry("PasticheSamplePicture", "Mask of the first style", picture="coffee"),
        "3": _entry("PasticheStyleEntry", "Style Entry: first style", mask=["2", 1], strength=1.0),
        "4": _entry("PasticheStyleEntry", "Style Entry: second style", strength=0.6),
        "5": _entry("PasticheMultiStyleGuider", model=["1", 0], positive=["1", 2], negative=["1", 2], cfg=2.0, **{"styles.style0": ["3", 0], "styles.style1": ["4", 0]}),
        "6": _entry("SamplerCustomAdvanced", guider=["5", 0]),
    }, [[("1", 230, 0), ("2", 230, 280)], [("3", 300, 0), ("4", 300, 0)], [("5", 300, 0)], [("6", 260, 0)]], False),
    "compare": ({
        "1": _entry("PasticheSamplePicture", "Photo", picture="dandelion"), "2": _entry("PasticheSamplePicture", "Painting", picture="woodcut"),
        "3": _entry("ImageScale", "Any result", image=["2", 0], upscale_method="lanczos", width=910, height=512, crop="center"),
        "4": _entry("PasticheCompare", before=["1", 0], after=["3", 0]),
    }, [[("1", 260, 280), ("2", 260, 320)], [("3", 260, 0)], [("4", 520, 420)]], True),
}

ARRANGE = """(columns) => {
    let x = 0;
    for (const column of columns) {
        let y = 0;
        const sized = column.map(([id, width, height]) => {
            const node = app.graph.getNodeById(Number(id)), least = node.computeSize();
            node.setSize([width, Math.max(height, least[1])]);
            node.pos = [x, y];
            y += node.size[1] + 60;
            return node.size[0];
        });
        x += Math.max(...sized) + 70;
    }
    app.canvas.setDirty(true, true);
}"""


def canvas(ui, name: str) -> Image.Image:
    """Nodes as ComfyUI's front end (a host.frontend.Frontend) draws them, cut to their bounds."""
    graph, columns, first = CANVASES[name]
    ui.open()  # nothing of another graph's results
    ui.load_api(graph, name)
    ui.page.evaluate(ARRANGE, columns)
    if first:
        ui.queue()
    ui.page.evaluate("() => app.canvas.deselectAll?.()")
    ui.command("Comfy.Canvas.FitView")
    time.sleep(0.7)  # it glides
    # smaller than the view: the page's own panels lie on its edges
    ui.page.evaluate("""() => {
        const { ds, canvas } = app.canvas;
        ds.changeScale(ds.scale * 0.84, [canvas.clientWidth / 2, canvas.clientHeight / 2]);
        app.canvas.setDirty(true, true);
    }""")
    time.sleep(1.5)
    bounds = ui.page.evaluate(
        """() => {
            const nodes = app.graph.nodes, edge = (pick, way) => way(...nodes.map(pick));
            const [left, top] = app.canvasPosToClientPos([edge((n) => n.pos[0], Math.min) - 16, edge((n) => n.pos[1], Math.min) - 46]);
            const [right, bottom] = app.canvasPosToClientPos([edge((n) => n.pos[0] + n.size[0], Math.max) + 16, edge((n) => n.pos[1] + n.size[1], Math.max) + 16]);
            return [left, top, right - left, bottom - top];
        }"""
    )
    shot: bytes = ui.page.do(lambda page: page.screenshot(clip=dict(zip(("x", "y", "width", "height"), bounds))))
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    return picture
