"""What the template browser shows: for each workflow its file, its note, its groups and its subgraphs.

The graphs themselves are workflows/api/<api>.json; tools/make_workflow.py puts both together. The template browser
has nothing but the file name for title and description, so the name says what one gets, and its number the order of
learning. A graph opens at the zoom that shows all of it: kept within WIDTH x HEIGHT the text is legible on 1920x1080.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH, HEIGHT = 2400, 1350  # graph units; the front end opens a template at 0.75 of the window, and leaves out text below a zoom of 0.57
NOTE = "Read me"

SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors", "directory": "checkpoints",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
}
FASTSAM = {"name": "FastSAM-s.pt", "directory": "fastsam", "url": "https://github.com/ultralytics/assets/releases/download/v8.3.0/FastSAM-s.pt"}
CHURCH = {
    "name": "ddpm-church-256", "directory": "diffusers",
    "url": "https://huggingface.co/google/ddpm-church-256/resolve/main/diffusion_pytorch_model.safetensors",
}


def _file(directory: str, repository: str, path: str) -> dict[str, str]:
    return {"name": path.rpartition("/")[2], "directory": directory, "url": f"https://huggingface.co/{repository}/resolve/main/{path}"}


QWEN, Z_IMAGE = "Comfy-Org/Qwen-Image_ComfyUI", "Comfy-Org/z_image_turbo"
# What a loader names is looked up here: where it comes from and belongs, as ComfyUI's own templates have it
MODELS = {model["name"]: model for model in (
    SD15, FASTSAM, CHURCH,
    _file("diffusion_models", "Comfy-Org/flux1-dev", "flux1-dev.safetensors"),
    _file("text_encoders", "comfyanonymous/flux_text_encoders", "clip_l.safetensors"),
    _file("text_encoders", "comfyanonymous/flux_text_encoders", "t5xxl_fp16.safetensors"),
    _file("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors"),
    _file("checkpoints", "Comfy-Org/stable-diffusion-3.5-fp8", "sd3.5_large_fp8_scaled.safetensors"),
    _file("diffusion_models", QWEN, "split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors"),
    _file("text_encoders", QWEN, "split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"),
    _file("vae", QWEN, "split_files/vae/qwen_image_vae.safetensors"),
    _file("diffusion_models", Z_IMAGE, "split_files/diffusion_models/z_image_turbo_bf16.safetensors"),
    _file("text_encoders", Z_IMAGE, "split_files/text_encoders/qwen_3_4b.safetensors"),
)}


@dataclass(frozen=True)
class Box:
    """A subgraph: the nodes inside by title, and the dials on it, each a label and the (title, input)s it turns."""

    title: str
    nodes: tuple[str, ...]
    dials: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    labels: dict[str, str] = field(default_factory=dict)  # label by "title.input" of an input, or by an output's title
    description: str = ""


@dataclass(frozen=True)
class Template:
    file: str
    api: str
    note: str
    # from left to right: stacks of groups; a group is (title or "", its columns of node titles)
    stacks: tuple[tuple[tuple[str, tuple[tuple[str, ...], ...]], ...], ...]
    boxes: tuple[Box, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    shown: tuple[str, str, str] | None = None  # thumbnail: titles of content, style and result
    pictured_by: str = ""  # without: the mini template (api) whose thumbnail it shares, beside those of the same name
    drawn: tuple[str, str, int] | None = None  # with pictured_by: samples of content and style, longest side, for a thumbnail of its own

    @property
    def mini(self) -> bool:
        """Runs at once, on the model that comes with the pack."""
        return self.api.endswith("_mini")


def _dial(label: str, *turns: tuple[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return label, turns


QUICK = Box(
    "Photo in the painting's style",
    ("Mini model", "Photo size", "Painting size", "Encode content", "Encode style", "Schedule", "Invert content", "Invert style",
     "Content in the style's tones", "Style injection", "Sampler", "Sample", "Decode"),
    (
        _dial("style amount", ("Style injection", "strength"), ("Content in the style's tones", "strength")),
        _dial("keep the photo's shapes", ("Style injection", "gamma")),
        _dial("size", ("Photo size", "largest_size"), ("Painting size", "largest_size")),
        _dial("steps", ("Schedule", "steps")),
    ),
    {"Decode": "image"},
    "StyleID on the mini model: both pictures are inverted, and the photo is drawn again with the painting's attention.",
)

REFERENCE = "The style picture runs beside the sample"


def _reference(file: str, api: str, note: str, pictures: tuple[tuple[str, ...], ...], start: tuple[str, ...], sizes: dict[str, tuple[int, int]],
               **thumbnail) -> Template:
    """A graph of Style Reference: pictures and what they need, from which noise (may be empty), the node, the result."""
    groups = (("Start", (start,) if start else ()), ("Style", ((REFERENCE,),)), ("Draw", (("Sampler", "Sample", "Decode", "Result"), ("Compare",))))
    numbered = enumerate(((title, columns) for title, columns in groups if columns), 2)
    stacks = ((("", ((NOTE,),)), ("1 Pictures", pictures)), *(((f"{number} {title}", columns),) for number, (title, columns) in numbered))
    return Template(file, api, note, stacks, sizes=sizes, **thumbnail)


CHOSEN = Box(
    "Photo in the chosen style",
    ("Photo size", "Encode content", "Invert content", "Content in the style's tones", "Style injection", "Sampler", "Sample", "Decode"),
    (
        _dial("style amount", ("Style injection", "strength"), ("Content in the style's tones", "strength")),
        _dial("keep the photo's shapes", ("Style injection", "gamma")),
        _dial("size", ("Photo size", "largest_size")),
    ),
    {"Decode": "image", "Style injection.style": "style features", "Content in the style's tones.style": "style noise"},
    "StyleID on the mini model: the photo is inverted and drawn again with the attention of the style from the library.",
)

TEMPLATES = [
    Template(
        "01 Quick start - a photo in a painting's manner", "quick_start_mini",
        "## A photo in a painting's manner\n\n"
        "Press **Run** (about a minute on a CPU). Drag the slider over *Compare*.\n\n"
        "**Change first:** another *picture*; then *style amount*: 0 is the photo, 1 is all of the style.\n\n"
        "**Your own:** press *Use my own picture*, then choose a file.\n\n"
        "The open subgraph icon shows what is inside; the next template has it laid out.",
        (
            (("1 Pictures", (("Photo", "Painting"),)),),
            (("", ((NOTE,),)), ("2 Style", (("Photo in the painting's style",),)), ("3 Result", (("Result",),))),
            (("", (("Compare",),)),),
        ),
        (QUICK,),
        {NOTE: (460, 200), "Photo": (300, 340), "Painting": (300, 380), "Photo in the painting's style": (420, 170), "Result": (420, 330),
         "Compare": (680, 760)},
        ("Photo", "Painting", "Result"),
    ),
    Template(
        "01 Quick start - choose a style", "choose_style_mini",
        "## Choose a style by its picture\n\n"
        "Click a picture in the *Style library*, press **Run**. Drag the slider over *Compare*.\n\n"
        "**Change first:** the style; then *style amount* and *keep the photo's shapes*.\n\n"
        "**Your own style:** *Save Features* puts one into the library, *Save Style LoRA* a trained one; each with its picture and its model.",
        (
            (("1 Pictures", (("Photo", "Mini model", "Schedule"),)),),
            (("2 Style", (("Style library",),)),),
            (("", ((NOTE,),)), ("3 Draw", (("Photo in the chosen style",),)), ("4 Result", (("Result",),))),
            (("", (("Compare",),)),),
        ),
        (CHOSEN,),
        {NOTE: (460, 200), "Photo": (300, 340), "Style library": (520, 760), "Photo in the chosen style": (460, 170), "Result": (460, 330), "Compare": (620, 760)},
        ("Photo", "Style library", "Result"),
    ),
    Template(
        "02 StyleID - every step in sight", "styleid_mini",
        "## StyleID, step by step\n\n"
        "**1** two pictures, **2** each turned into noise from which the model draws it again, its features kept, "
        "**3** the style's attention put into the model, **4** the photo's noise drawn with it.\n\n"
        "**Change first:** *gamma* in Style injection: 0.75 keeps the photo, 0.3 is nearer the painting. "
        "Then *temperature*: above 1 sharper.\n\n"
        "The same *Schedule* feeds inversion and sampler. Keep add_noise off, euler, cfg 1.",
        (
            (("", ((NOTE,),)),
             ("1 Pictures", (("Content", "Style"), ("Mini model", "Content size", "Style size"), ("Schedule", "Encode content", "Encode style")))),
            (("2 Invert", (("Invert content",), ("Invert style",))),
             ("3 Style", (("Content in the style's tones",), ("Style injection",)))),
            (("4 Draw", (("Sampler", "Sample", "Decode", "Result"), ("Compare",))),),
        ),
        sizes={NOTE: (790, 190), "Result": (270, 340), "Compare": (470, 600)},
        shown=("Content", "Style", "Result"),
    ),
    Template(
        "03 InjectFusion - one picture in another's look", "injectfusion_mini",
        "## InjectFusion\n\n"
        "The *original* gives the look, the *content* what is in the picture: its deepest features (h-space) turn the original's.\n\n"
        "**Change first:** *gamma* in Inject content: how far towards the content. Then *omega* in Calibrated sampler: "
        "how much of the original's colours stay.\n\n"
        "Both pictures should have one size.",
        (
            (("", ((NOTE,),)),
             ("1 Pictures", (("Original: gives the look", "Content: what is injected"), ("Mini model", "Original size", "Content size"),
                             ("Schedule", "Encode original", "Encode content")))),
            (("2 Invert", (("Invert original",), ("Invert content",))),
             ("3 Inject", (("Content's h-space",), ("Inject content", "Calibrated sampler")))),
            (("4 Draw", (("Sample", "Decode", "Result"), ("Compare",))),),
        ),
        sizes={NOTE: (790, 190), "Result": (270, 340), "Compare": (470, 600)},
        shown=("Content: what is injected", "Original: gives the look", "Result"),
    ),
    Template(
        "04 InjectFusion sweep - nine settings side by side", "injectfusion_sweep_mini",
        "## Nine settings in one run\n\n"
        "Rows: gamma 0.2, 0.5, 0.8. Columns: omega 0, 0.3, 0.7.\n\n"
        "**Change first:** the pictures. The settings are inside *Nine settings*: open it with its icon.",
        (
            (("", ((NOTE,),)),
             ("1 Pictures", (("Original: gives the look", "Content: what is injected"), ("Mini model", "Original size", "Content size"),
                             ("Schedule", "Encode original", "Encode content")))),
            (("2 Invert", (("Invert original",), ("Invert content",))),
             ("3 Inject", (("Content's h-space", "Nine settings"),))),
            (("4 Draw", (("Sweep: rows gamma 0.2, 0.5, 0.8; columns omega 0, 0.3, 0.7",),)),),
        ),
        (Box("Nine settings",
             tuple(f"gamma {g}" for g in (0.2, 0.5, 0.8)) + tuple(f"omega {o}" for o in (0.0, 0.3, 0.7))
             + tuple(f"gamma {g}, omega {o}" for g in (0.2, 0.5, 0.8) for o in (0.0, 0.3, 0.7))
             + ("All of them", "Decode", "One by one", "Rows: gamma 0.2, 0.5, 0.8. Columns: omega 0, 0.3, 0.7")),),
        {NOTE: (770, 190), "Sweep: rows gamma 0.2, 0.5, 0.8; columns omega 0, 0.3, 0.7": (620, 700)},
        ("Content: what is injected", "Original: gives the look", "Sweep: rows gamma 0.2, 0.5, 0.8; columns omega 0, 0.3, 0.7"),
    ),
    Template(
        "05 Train a style LoRA - from one picture", "diffstyler_train_mini",
        "## A style LoRA from one picture\n\n"
        "Trains for a minute or two, saves the LoRA into `output/loras` and paints over a photo with it.\n\n"
        "**Change first:** the style picture; *steps* of Train the style; *denoise* of Paint over the photo: how much is repainted.",
        (
            (("", ((NOTE,),)), ("1 Pictures", (("Style", "A photo to try it on"), ("Mini model, painting", "Mini model, empty prompt", "Style size", "A photo to try it on size", "Encode content")))),
            (("2 Train", (("Train the style",), ("Use it at once", "Loss", "Save the LoRA"))),),
            (("3 Draw", (("Paint over the photo", "Decode", "Result"), ("Compare",))),),
        ),
        sizes={NOTE: (560, 180), "Result": (270, 330), "Compare": (470, 560), "Loss": (270, 300), "Train the style": (230, 760)},
        shown=("A photo to try it on", "Style", "Result"),
    ),
    Template(
        "06 DiffStyler - restyle one thing, keep the rest", "diffstyler_mini",
        "## DiffStyler\n\n"
        "A style LoRA redraws the cup; the photo's own features keep its shapes, and outside the mask the photo stays.\n\n"
        "**Change first:** *strength_model* of Style LoRA; *feature_steps* of Keep the content's structure: less is freer.\n\n"
        "**Another region:** any MASK. With your own picture: right click on it, *Open in MaskEditor*.",
        (
            (("", ((NOTE,),)), ("1 Pictures", (("Content", "Style"), ("Mini model, empty prompt", "Content size", "Encode content", "Mini model, painting", "Style size")))),
            (("2 Invert", (("Schedule",), ("Invert content",), ("Content features, model without LoRA",))),
             ("3 Style", (("Train the style",), ("Style LoRA",), ("Keep the content's structure", "Leave the rest as it is")))),
            (("4 Draw", (("Sampler", "Sample", "Decode", "Result"), ("Compare",))),),
        ),
        sizes={NOTE: (540, 200), "Result": (260, 320), "Compare": (400, 500), "Train the style": (230, 650)},
        shown=("Content", "Style", "Result"),
    ),
    Template(
        "07 Two styles in one picture - each in its place", "diffstyler_multistyle_mini",
        "## Two styles, one sampling\n\n"
        "Each *style* box trains a LoRA and says where it acts: left half, right half, soft between.\n\n"
        "**Change first:** the style pictures, then *strength* on the boxes. For other places open a box and change its mask.",
        (
            (("", ((NOTE,),)), ("1 Pictures", (("Content", "Mini model, empty prompt", "Content size", "Encode content"), ("Style left", "Style right", "Mini model, painting")))),
            (("2 Invert", (("Schedule",), ("Invert content",), ("Content features, model without LoRA",))),
             ("3 Style", (("Left half in a style", "Right half in a style"), ("Keep the content's structure", "All styles in one pass")))),
            (("4 Draw", (("No new noise", "Sampler", "Sample", "Decode", "Result"), ("Compare",))),),
        ),
        tuple(
            Box(f"{side.capitalize()} half in a style",
                (f"Style {side} size", f"Train the {side} style", f"The {side} half: nothing", f"The {side} half: everything",
                 f"The {side} half: soft edges", f"The {side} half", f"Style {side}: where and how much"),
                (_dial("strength", (f"Style {side}: where and how much", "strength")), _dial("training steps", (f"Train the {side} style", "steps"))))
            for side in ("left", "right")
        ),
        {NOTE: (560, 180), "Result": (260, 320), "Compare": (430, 520)},
        ("Style left", "Style right", "Result"),
    ),
    Template(
        "08 Click an object - restyle only that", "fastsam_localized_style_mini",
        "## Click on what shall be restyled\n\n"
        "Left click on the picture takes an object, right click leaves one out, a drag draws a box; then **Run**.\n\n"
        "**Change first:** the marks, then *gamma* and *LoRA strength*. Two ways to draw it: StyleID at once, DiffStyler with a LoRA it trains. Outside the mask nothing changes.\n\n"
        "The small segmenter knows drawn shapes only. For photos put FastSAM-s.pt into models/fastsam.",
        (
            (("", ((NOTE,),)), ("1 Pictures", (("Content", "Style"), ("Mini model, empty prompt", "Mini model, painting", "Content size", "Style size", "Encode content", "Encode style")))),
            (("2 Pick", (("Pick the objects to restyle",), ("Segmenter", "Objects and mask"))),
             ("3 Invert", (("Schedule", "Sampler"), ("Invert content",), ("Invert style",)))),
            (("4 Style", (("StyleID", "DiffStyler"),)),
             ("", (("Compare StyleID",),))),
            (("5 Results", (("StyleID on the object", "DiffStyler on the object"),)),
             ("", (("Compare DiffStyler",),))),
        ),
        (
            Box("StyleID",
                ("Content features", "Style features", "The object in the style's tones", "StyleID in the object", "StyleID: leave the rest as it is",
                 "Sample with StyleID", "Decode StyleID"),
                (_dial("gamma", ("StyleID in the object", "gamma")), _dial("temperature", ("StyleID in the object", "temperature"))),
                {"Decode StyleID": "image"}),
            Box("DiffStyler",
                ("Train the style", "Style LoRA", "Content features, model without LoRA", "Keep the content's structure",
                 "DiffStyler: leave the rest as it is", "Sample with DiffStyler", "Decode DiffStyler"),
                (_dial("LoRA strength", ("Style LoRA", "strength_model")), _dial("training steps", ("Train the style", "steps"))),
                {"Decode DiffStyler": "image"}),
        ),
        {NOTE: (560, 200), "Pick the objects to restyle": (380, 600), "Objects and mask": (260, 380), "StyleID on the object": (320, 360),
         "DiffStyler on the object": (320, 360), "Compare StyleID": (320, 400), "Compare DiffStyler": (320, 400)},
        ("Content", "Style", "StyleID on the object"),
    ),
    _reference(
        "09 Style Reference - one node, no inversion, any model", "style_reference_mini",
        "## Style Reference\n\n"
        "The style picture runs beside the sample, whose attention sees it. Nothing is inverted: the photo gets new noise "
        "and is painted over, here by a small network of Flux's class. Works the same on Flux, SD3.5, Qwen-Image, Z-Image, Wan and U-Nets.\n\n"
        "**Change first:** *denoise* of the schedule: how much is repainted; then *strength* and *preset* of the style node.",
        (("My picture", "Style"), ("Mini model", "Picture size", "Style size"), ("Schedule from a noised start", "Encode picture", "Encode style")), (),
        {NOTE: (790, 190), "Result": (270, 340), "Compare": (470, 600)},
        shown=("My picture", "Style", "Result"),
    ),
    _reference(
        "10 Restyle my picture - a small Flux, inverted", "restyle_transformer_mini",
        "## Restyle my picture on a flow transformer\n\n"
        "A small network of Flux's class stands in for the large ones. Photo and style picture are inverted, then the photo is drawn "
        "again beside the style, whose attention it takes.\n\n"
        "**Change first:** the *Style*; then *gamma*: how much of the photo's own attention stays; *share*: join keeps the photo and takes colours. "
        "Templates 18 to 25 do the same on large models.",
        (("My picture", "Style"), ("Mini transformer", "Picture size", "Style size", "Encode picture", "Encode style")),
        ("Schedule", "Invert picture", "Invert style", "Guider"),
        {NOTE: (600, 220), "Result": (270, 340), "Compare": (440, 560)},
        shown=("My picture", "Style", "Result"),
    ),
    _reference(
        "10 Style from a picture - a small Flux, from noise", "style_reference_transformer_mini",
        "## A new picture in a picture's style\n\n"
        "Nothing is restyled here: the small Flux draws from noise, beside the style picture, whose attention it takes. It knows no words, only kinds: "
        "here a painting. It draws no things, but you see what comes from the style.\n\n"
        "**Change first:** the *Style*; then *share*: join takes less of it; then the seed. Templates 19 to 25 do the same for a prompt.",
        (("Style",), ("Mini transformer", "Style size", "Encode style")), ("Size", "Noise", "Schedule", "Guider"),
        {NOTE: (600, 220), "Result": (270, 340), "Compare": (440, 560)},
        shown=("Style", "Style", "Result"),
    ),
]


def _with(template: Template, file: str, api: str, note: str, models: tuple[str, ...], sizes: dict[str, tuple[int, int]] | None = None,
          after: dict[str, str] | None = None) -> Template:
    """A template's layout for its graph with a large model: a column of loaders and prompts instead of the mini model's."""
    stacks = []
    for stack in template.stacks:
        groups = []
        for title, columns in stack:
            columns = [tuple(n for name in column for n in ((name, after[name]) if name in (after or {}) else (name,)) if not name.startswith("Mini model"))
                       for column in columns]
            if title == "1 Pictures":
                columns.insert(len(columns) - 1, models)
            groups.append((title, tuple(column for column in columns if column)))
        stacks.append(tuple(groups))
    text = note + "\n\n" + template.note.partition("\n\n")[2].partition("\n\nThe small segmenter")[0]
    return Template(file, api, text, tuple(stacks), template.boxes, {**template.sizes, **(sizes or {})})


def _by_api(api: str) -> Template:
    return next(template for template in TEMPLATES if template.api == api)


NEEDS = "## {}\n\nNeeds a checkpoint: choose yours in *Checkpoint*, or let ComfyUI download the one named there."
SD = "Checkpoint (any SD1.x or SD2.x)"
SDXL = "Checkpoint (SD1.5, SD2, SDXL)"
PROMPTS = ("What the style picture shows", "Prompt", "Negative prompt", "Empty prompt")

TEMPLATES += [
    _with(_by_api("styleid_mini"), "11 StyleID - with your checkpoint", "styleid", NEEDS.format("StyleID with a large model"),
          (SDXL, "Empty prompt"), {NOTE: (790, 210), "Compare": (310, 310), "How well the content inverts": (310, 260)},
          {"Compare": "How well the content inverts"}),
    _with(_by_api("injectfusion_mini"), "12 InjectFusion - with your checkpoint", "injectfusion",
          NEEDS.format("InjectFusion with a large model"), (SDXL, "Empty prompt"), {"Compare": (380, 480)}),
    _with(_by_api("injectfusion_mini"), "13 InjectFusion - unconditional, a diffusers folder", "injectfusion_unconditional",
          "## InjectFusion as in the paper\n\nNeeds a diffusers folder: put `config.json` and `diffusion_pytorch_model.safetensors` of "
          "huggingface.co/google/ddpm-church-256 into `models/diffusers/ddpm-church-256`, then reload the page.",
          ("Unconditional DDPM",), {NOTE: (790, 220), "Compare": (380, 480)}),
    _with(_by_api("diffstyler_train_mini"), "14 Train a style LoRA - with your checkpoint", "diffstyler_train",
          NEEDS.format("A style LoRA for a large model"), (SD, *PROMPTS), {NOTE: (800, 180), "Compare": (400, 500)}),
    _with(_by_api("diffstyler_mini"), "15 DiffStyler - with your checkpoint", "diffstyler",
          NEEDS.format("DiffStyler with a large model"), (SD, *PROMPTS), {NOTE: (800, 200), "Compare": (300, 360), "Result": (240, 300)}),
    _with(_by_api("diffstyler_multistyle_mini"), "16 Two styles in one picture - with your checkpoint", "diffstyler_multistyle",
          NEEDS.format("Two styles, one sampling"), (SD, *PROMPTS), {NOTE: (800, 180), "Compare": (280, 360)}),
    _with(_by_api("fastsam_localized_style_mini"), "17 Click an object - with your checkpoint", "fastsam_localized_style",
          NEEDS.format("Click on what shall be restyled") + " FastSAM-s.pt goes into models/fastsam; it wants "
          "`pip install --no-deps ultralytics opencv-python-headless`.",
          (SD, *PROMPTS), {NOTE: (800, 220), "Compare StyleID": (290, 360), "Compare DiffStyler": (290, 360),
                           "StyleID on the object": (290, 340), "DiffStyler on the object": (290, 340)}),
]

SHARED = "restyle_transformer_mini"


def _large(file: str, api: str, note: str, loaders: tuple[str, ...], start: tuple[str, ...], drawn: tuple[str, str, int],
           restyles: bool = True) -> Template:
    """Style Reference on a large model; `drawn`: its thumbnail, see Template."""
    columns = (("My picture", "Style"), loaders, ("Picture size", "Style size", "Encode picture", "Encode style"))
    if not restyles:
        columns = (("Style",), loaders, ("Style size", "Encode style"))
    return _reference(
        file, api, note, columns, start,
        {NOTE: (860, 200), "Result": (270, 340), "Compare": (400, 520), "Prompt": (280, 120), "Empty prompt": (280, 90), "Negative prompt": (280, 90)},
        pictured_by=SHARED, drawn=drawn,
    )


INVERTED = (
    "## Restyle my picture with {}\n\n"
    "The picture is inverted: drawn backwards into noise from which the model draws it again, now beside the style picture, whose attention it takes.\n\n"
    "**Change first:** *gamma* in the style node: how much of the picture's own attention stays. Keep the prompt empty, euler, and one *Schedule* for both. "
    "Not run on the large model by us: its graph was checked, its pictures were not seen."
)
NOISED = (
    "## Restyle my picture with {}\n\n"
    "Eight steps are too few to invert a picture, so it gets new noise and is painted over beside the style picture.\n\n"
    "**Change first:** *denoise* of the schedule: how much is repainted; then the prompt. "
    "Not run on the large model by us: its graph was checked, its pictures were not seen."
)
FROM_TEXT = (
    "## A prompt in a picture's style with {}\n\n"
    "The style picture is encoded and runs beside the sample, whose attention sees it; nothing is trained or inverted.\n\n"
    "**Change first:** the prompt and the *Style*; then *preset*: \"more style\" is nearer to it. "
    "Not run on the large model by us: its graph was checked, its pictures were not seen."
)
SPLIT = ("Diffusion model", "Text encoder", "VAE", "Shift")
FLUX = ("Diffusion model", "Text encoders", "VAE")
TEMPLATES += [
    _large("18 Restyle my picture - Flux", "restyle_flux", INVERTED.format("Flux"), (*FLUX, "Empty prompt", "Guidance"),
           ("Schedule", "Invert picture", "Guider"), ("coffee", "woodcut", 384)),
    _large("19 Style from a picture - Flux", "style_reference_flux", FROM_TEXT.format("Flux"), FLUX,
           ("Prompt", "Guidance", "No negative prompt", "Size", "Schedule"), ("coffee", "woodcut", 384), False),
    _large("20 Restyle my picture - SD3.5", "restyle_sd35", INVERTED.format("Stable Diffusion 3.5"), ("Checkpoint", "Empty prompt"),
           ("Schedule", "Invert picture", "Guider"), ("astronaut", "impasto", 256)),
    _large("21 Style from a picture - SD3.5", "style_reference_sd35", FROM_TEXT.format("Stable Diffusion 3.5"), ("Checkpoint",),
           ("Prompt", "Negative prompt", "Size", "Schedule"), ("astronaut", "impasto", 256), False),
    _large("22 Restyle my picture - Qwen-Image", "restyle_qwen_image", INVERTED.format("Qwen-Image"), (*SPLIT, "Empty prompt"),
           ("Schedule", "Invert picture", "Guider"), ("coffee", "impasto", 384)),
    _large("23 Style from a picture - Qwen-Image", "style_reference_qwen_image", FROM_TEXT.format("Qwen-Image"), SPLIT,
           ("Prompt", "Negative prompt", "Size", "Schedule"), ("coffee", "impasto", 384), False),
    _large("24 Restyle my picture - Z-Image Turbo", "restyle_z_image", NOISED.format("Z-Image Turbo"), (*SPLIT, "Prompt"),
           ("No negative prompt", "Schedule from a noised start"), ("astronaut", "woodcut", 256)),
    _large("25 Style from a picture - Z-Image Turbo", "style_reference_z_image", FROM_TEXT.format("Z-Image Turbo"), SPLIT,
           ("Prompt", "No negative prompt", "Size", "Schedule"), ("astronaut", "woodcut", 256), False),
]

PANS = (
    "## A film in a painting's manner\n\n"
    "The film here is a picture frame that moves over a photo; press **Run** (a minute or two on a CPU).\n\n"
    "**Change first:** *steady*: how firmly every dab stays on its place; then *gamma*: lower lets more of the painting in. "
    "Frames are written to the output folder as they are done, so a stopped run goes on.\n\n"
    "**Your own:** connect the images of Load Video and Get Video Components to *frames*."
)
OF_MINE = (
    "## My film in a painting's manner\n\n"
    "Choose a file in *My film*. A few frames at a time are restyled and written, so memory does not grow with the film, "
    "and a stopped run goes on.\n\n"
    "**Change first:** *steady*, then *gamma*; *chunk*: as many frames as your memory takes. "
    "Not run on the large model by us: its graph was checked, its films were not seen."
)
TEMPLATES += [
    Template(
        "26 Restyle a film - without flicker", "film_mini", PANS,
        (
            (("", ((NOTE,),)), ("1 Pictures", (("Photo", "Painting"), ("Mini model", "Scene", "The camera pans", "Painting size")))),
            (("2 Style", (("Restyle the film",),)),),
            (("3 Film", (("Film", "Result"), ("Compare",))),),
        ),
        (Box("The camera pans", (*(f"Frame {number}" for number in range(1, 8)), "Frames"), labels={"Frames": "frames"},
             description="Seven pictures cut out of the scene, each a little further: a film whose motion is known."),),
        {NOTE: (560, 240), "Film": (300, 420), "Restyle the film": (270, 760), "Result": (300, 340), "Compare": (470, 600)},
        ("Photo", "Painting", "Result"),
    ),
    Template(
        "27 Restyle a film - with your checkpoint", "film", OF_MINE,
        (
            (("", ((NOTE,),)), ("1 Pictures", (("My film", "Painting"), ("Checkpoint (SD1.5, SD2, SDXL)", "Empty prompt", "Its frames", "Frame size", "Painting size")))),
            (("2 Style", (("Restyle the film",),)),),
            (("3 Film", (("Film", "Save the film"), ("Compare",))),),
        ),
        sizes={NOTE: (560, 240), "My film": (300, 300), "Restyle the film": (270, 760), "Save the film": (300, 380), "Compare": (470, 600)},
    ),
]
