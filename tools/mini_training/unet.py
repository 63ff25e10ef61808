"""The mini U-Net: ComfyUI's own network at SD1.x's block positions, and its starting values.

Import only after ComfyUI is on the path and `comfy.options.args_parsing` is settled.
"""
import torch
from torch import nn

CONFIG = dict(
    image_size=32, in_channels=16, out_channels=16, model_channels=64, channel_mult=[1, 2, 2, 2],
    num_res_blocks=[2, 2, 2, 2], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1,
    use_spatial_transformer=True, context_dim=64, num_heads=-1, num_head_channels=32,
    legacy=False, use_linear_in_transformer=False, use_checkpoint=False,
)
TOKENS = 8  # context tokens a kind


def build(config=CONFIG, seed=0):
    """UNetModel in fp32 with weights drawn from `seed` (ComfyUI's layers leave them unset)."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    model = UNetModel(**config, dtype=torch.float32, device="cpu", operations=disable_weight_init)
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    # Every residual branch and the output begin at zero: the network starts as the identity.
    for name, module in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(module.weight)
    return model


class Denoiser(nn.Module):
    """U-Net plus learned context tokens, (kinds, TOKENS, context_dim)."""

    def __init__(self, kinds, config=CONFIG, seed=0):
        super().__init__()
        self.unet = build(config, seed)
        self.context = nn.Parameter(0.5 * torch.randn(kinds, TOKENS, config["context_dim"]))

    def forward(self, x, timesteps, kind, transformer_options=None):
        """x (B, 16, h, w) sqrt(abar) z + sqrt(1 - abar) eps; timesteps (B) in 0..999; kind (B) index."""
        return self.unet(x, timesteps, self.context[kind], transformer_options=transformer_options or {})


def alphas_cumprod():
    """SD1.x: sqrt-linear betas 0.00085..0.012, 1000 steps -> (1000) float32."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
