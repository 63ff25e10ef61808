"""FastSAM nodes (Zhao et al. 2023): masks by points, boxes, text or all at once."""

from __future__ import annotations

from .algorithms.prompts import parse_boxes, parse_points
from .host.checks import checked
from .host.compatibility import io
from .host.fastsam.model import FastSAM, list_fastsam, load_fastsam
from .host.fastsam.prompt import AUTO, MODES, Finish, Prompt, prompt_masks
from .host.fastsam.preview import picker_preview
from .host.fastsam.text import NO_FOLDER, list_clip_folders
from .sockets import FastSAMSocket

CATEGORY = "pastiche/mask"


class LoadFastSAM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadFastSAM",
            display_name="Load FastSAM",
            category=CATEGORY,
            description="Loads a FastSAM model (one-class YOLOv8-seg: FastSAM-s.pt, FastSAM-x.pt, a .safetensors of one, or an "
            "ONNX export) from models/fastsam or models/ultralytics/segm. Checkpoints need the ultralytics package.",
            search_aliases=["fastsam", "segment anything", "sam", "yolo", "segmentation"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_fastsam(),
                    tooltip="A file of models/fastsam or of the folders that other packs keep ultralytics models in. The demo model "
                    "knows drawn shapes only; FastSAM-s and FastSAM-x know the world.",
                )
            ],
            outputs=[FastSAMSocket.Output(display_name="fastsam", tooltip="For FastSAM Prompt.")],
        )

    @classmethod
    @checked
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_fastsam(model_name))


class FastSAMPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheFastSAMPrompt",
            display_name="FastSAM Prompt",
            category=CATEGORY,
            description="Finds every object of an image once, then chooses by points, boxes, text or rank. Pick on the image: left "
            "click takes, right click or shift removes, a drag draws a box. Changing the prompt does not run the network again.",
            search_aliases=["fastsam", "segment", "mask", "mask points", "points editor", "point picker", "bbox", "sam", "select object"],
            is_output_node=True,
            inputs=[
                FastSAMSocket.Input("fastsam", tooltip="From Load FastSAM."),
                io.Image.Input("image", tooltip="Images to segment; a batch shares the prompt."),
                io.String.Input(
                    "points",
                    default="",
                    multiline=False,
                    tooltip='Points in pixels as JSON, written by the picker: [{"x": 120, "y": 80}], [[120, 80]] or '
                    '{"positive": [...], "negative": [...]}. "label": 0 makes a point negative.',
                ),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=False,
                    tooltip='Boxes in pixels as JSON, written by the picker: [{"x": 10, "y": 20, "width": 30, "height": 40}] or '
                    "[[x1, y1, x2, y2]]. Each box takes the object that fills it best.",
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=AUTO,
                    tooltip="auto uses whatever points, boxes and text are given together, and everything if none are. "
                    "The last three take the first `count` objects by rank.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Phrases, one a line; a CLIP ranks the objects' crops. Needs clip_vision and clip, or clip_folder.",
                ),
                io.Boolean.Input(
                    "merge", default=True, optional=True, tooltip="On: one mask an image. Off: one mask an object, as a batch."
                ),
                io.Boolean.Input("invert", default=False, optional=True, tooltip="Everything but the chosen objects."),
                io.Int.Input(
                    "grow", default=0, min=-512, max=512, optional=True, tooltip="Pixels to grow the mask by; negative shrinks it."
                ),
                io.Float.Input(
                    "feather", default=0.0, min=0.0, max=256.0, step=0.5, optional=True, tooltip="Softens edges over this many pixels."
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="The image half of a CLIP, for text."),
                io.Clip.Input("clip", optional=True, tooltip="The text half of the same CLIP, with its text projection."),
                io.MultiType.Input(
                    "bboxes",
                    [io.BoundingBox, io.BoundingBoxes, io.BBOX],
                    optional=True,
                    tooltip="More boxes, from detectors and box editors: shared, or a list for each image.",
                ),
                io.String.Input(
                    "positive_coords", optional=True, force_input=True, tooltip="More positive points as JSON, from points editors."
                ),
                io.String.Input(
                    "negative_coords", optional=True, force_input=True, tooltip="More negative points as JSON, from points editors."
                ),
                io.Combo.Input(
                    "clip_folder",
                    options=list_clip_folders(),
                    default=NO_FOLDER,
                    optional=True,
                    advanced=True,
                    tooltip="Instead of clip_vision and clip: a transformers CLIP folder (config.json, model.safetensors, tokenizer) "
                    "under models/text_encoders or models/clip_vision.",
                ),
                io.Int.Input(
                    "count", default=1, min=1, max=300, optional=True, advanced=True, tooltip="Objects to take for each phrase or by rank."
                ),
                io.Combo.Input(
                    "point_takes",
                    options=["best", "smallest", "largest", "all"],
                    default="best",
                    optional=True,
                    advanced=True,
                    tooltip="Where objects lie inside each other, which one a point takes: the most confident, the smallest part, "
                    "the largest whole, or all.",
                ),
                io.Float.Input(
                    "confidence",
                    default=0.4,
                    min=0.02,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Objects scored lower are ignored.",
                ),
                io.Float.Input(
                    "overlap",
                    default=0.7,
                    min=0.1,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Objects that overlap more than this (IoU) count as one.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    optional=True,
                    advanced=True,
                    tooltip="Pixels of the image's longer side in the network; 0 is what the model was trained with.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="One an image, or one an object if not merged; empty where nothing fits."),
                io.Image.Output(display_name="overlay", tooltip="The image with all objects outlined and numbered, the mask bright."),
                io.Image.Output(display_name="labels", tooltip="A flat colour for each object, black elsewhere, largest below."),
                io.BoundingBox.Output(display_name="bboxes", tooltip="The chosen objects' boxes, a list for each image."),
            ],
        )

    @classmethod
    def validate_inputs(cls, points=None, boxes=None) -> bool:
        """Raises ValueError, which ComfyUI shows once; a returned sentence it repeats for every input named here."""
        parse_points(points)
        parse_boxes(boxes)
        return True

    @classmethod
    @checked
    def execute(
        cls,
        fastsam: FastSAM,
        image,
        points="",
        boxes="",
        mode=AUTO,
        text="",
        merge=True,
        invert=False,
        grow=0,
        feather=0.0,
        clip_vision=None,
        clip=None,
        bboxes=None,
        positive_coords="",
        negative_coords="",
        clip_folder=NO_FOLDER,
        count=1,
        point_takes="best",
        confidence=0.4,
        overlap=0.7,
        resolution=0,
    ) -> io.NodeOutput:
        prompt = Prompt(
            points=(
                parse_points(points),
                parse_points(positive_coords, 1, "positive_coords"),
                parse_points(negative_coords, 0, "negative_coords"),
            ),
            boxes=(parse_boxes(boxes), parse_boxes(bboxes, "bboxes")),
            phrases=tuple(line.strip() for line in text.splitlines() if line.strip()),
            mode=mode,
            among=point_takes,
            count=count,
        )
        encoder = fastsam.text_encoder(clip_vision, clip, clip_folder)
        result = prompt_masks(
            fastsam, image, prompt, Finish(merge, invert, grow, feather), resolution, confidence, overlap, encoder
        )
        return io.NodeOutput(
            result.masks, result.overlay, result.labels, result.boxes, ui=picker_preview(image, result, cls)
        )
