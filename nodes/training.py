"""Training node: a style LoRA from one image or a few."""

from __future__ import annotations

from comfy_api.latest import ui

from .algorithms.lora import TARGETS
from .algorithms.training import SCHEDULES
from .host.checks import checked
from .host.compatibility import io
from .host.training.job import train_for_node
from .host.training.loop import LOSS_WINDOW, PRECISIONS, TrainingSettings
from .host.training.plot import loss_plot

CATEGORY = "pastiche/diffstyler"


class TrainStyleLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheTrainStyleLoRA",
            display_name="Train Style LoRA",
            category=CATEGORY,
            description="Learns the style of one image, or a few, as a LoRA of the attention projections (DiffStyler). "
            "Save it with Save LoRA Weights, use it at once with Load LoRA Model, or give it to a Style Entry.",
            search_aliases=["train lora", "style lora", "diffstyler", "fine-tune", "finetune", "dreambooth", "one-shot"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA is for. It is left exactly as it was."),
                io.Conditioning.Input(
                    "positive",
                    tooltip='What the images are called, for example "painting of <sss>, deer, grass": name what is in '
                    "the picture, so that the LoRA learns the rest. One for all images, or one each.",
                ),
                io.Latent.Input(
                    "latents", optional=True, tooltip="The encoded style image(s). Connect this, or image and vae."
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The style image(s), if they are to be encoded here; needs the vae."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Encodes image. Where it has a Gaussian posterior (SD's VAEs), a new sample is drawn each step.",
                ),
                io.Int.Input("rank", default=16, min=1, max=256, tooltip="Size of the LoRA. The paper uses 16."),
                io.Int.Input(
                    "steps", default=200, min=1, max=100000,
                    tooltip="Training steps altogether. The paper uses 200; too many copy the picture, not its style.",
                ),
                io.Float.Input(
                    "learning_rate", default=2e-4, min=1e-7, max=1.0, step=1e-7, round=False,
                    tooltip="AdamW's learning rate, constant unless schedule says otherwise. The paper uses 0.0002; small models "
                    "need more.",
                ),
                io.Combo.Input(
                    "targets", options=list(TARGETS), default="qkv",
                    tooltip="Which layers get a LoRA. qkv: queries, keys, values (the paper, against overfitting). "
                    "qkv+out: also the attention's output layer. all: every linear layer. all+conv: convolutions too, which "
                    "learn texture and a picture itself fastest.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seeds initialisation, noise, timesteps and augmentation: the same seed gives the same file.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, advanced=True, tooltip="Images per step."),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=1024.0, step=0.5, advanced=True,
                    tooltip="The LoRA's alpha: its strength is alpha / rank. 0: the same as rank, strength 1.",
                ),
                io.Boolean.Input(
                    "flip", default=False, advanced=True, tooltip="Mirror images at random. Not for pictures with writing."
                ),
                io.Float.Input(
                    "crop", default=1.0, min=0.25, max=1.0, step=0.05, advanced=True,
                    tooltip="Train on random windows with sides of at least this share. 1: always the whole image.",
                ),
                io.Float.Input(
                    "min_snr_gamma", default=0.0, min=0.0, max=20.0, step=0.5, advanced=True,
                    tooltip="Min-SNR loss weighting (5 is usual): evens out the timesteps. 0: the plain loss of the paper.",
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="model", advanced=True,
                    tooltip="Arithmetic of the model's layers. model: as loaded. bf16/fp16: mixed precision. "
                    "The LoRA itself is always float32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing", default=False, advanced=True,
                    tooltip="Saves memory for a third more time. Turned on by itself when memory runs out.",
                ),
                io.Boolean.Input(
                    "keep_on_cancel", default=False, advanced=True,
                    tooltip="Cancel ends the training early and hands on what was learned, instead of stopping the queue.",
                ),
                io.Int.Input(
                    "preview_every", default=0, min=0, max=10000, advanced=True,
                    tooltip="Shows a sample of the LoRA every so many steps (12 more model evaluations each). 0: never.",
                ),
                io.String.Input(
                    "checkpoint", default="", advanced=True,
                    tooltip="Name of a training state, kept in output/loras every 50 steps, at the end and on cancel. If it "
                    "exists, training goes on from it until `steps` are done, as if never interrupted. Empty: none.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default="constant", optional=True, advanced=True,
                    tooltip="The learning rate over the steps. constant: the paper. cosine: rises for a tenth of the steps, then "
                    "falls to nothing, which allows a higher rate and ends with less noise.",
                ),
                io.Float.Input(
                    "clean_weight", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Adds this many times the error of the clean latent to the loss, so that high noise, where tones and "
                    "layout form, counts more: 0.02 to 0.1 for noise-predicting models. 0: the loss of the paper.",
                ),
                io.Int.Input(
                    "validation_every", default=0, min=0, max=10000, optional=True, advanced=True,
                    tooltip="Measures the loss on 8 fixed draws of noise and timestep that training never uses, every so many "
                    "steps, and draws it in loss_plot: it falls smoothly where single losses jump. 0: never.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="For Save LoRA Weights, Load LoRA Model, or a Style Entry."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps done altogether, for the file name of Save LoRA Weights."),
                io.Image.Output(
                    display_name="loss_plot",
                    tooltip="The loss of every step as points, and their running mean, which shows the trend; with "
                    "validation_every the held-out loss too. For Preview Image.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, model, positive, latents=None, image=None, vae=None, checkpoint="", **settings) -> io.NodeOutput:
        trained = train_for_node(
            model, positive, latents, image, vae, TrainingSettings(**settings), checkpoint, cls.hidden.unique_id
        )
        return io.NodeOutput(
            trained.lora, {"loss": trained.losses}, trained.steps, loss_plot(trained.losses, LOSS_WINDOW, trained.validation),
            ui=ui.PreviewText(trained.summary()),
        )
