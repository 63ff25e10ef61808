"""The mini flow transformer: ComfyUI's own Flux class with small numbers, its starting values and a training forward.

Import only after ComfyUI is on the path and `comfy.options.args_parsing` is settled.
"""
import torch
import torch.nn.functional as F
from torch import nn

CONFIG = dict(
    in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=192, mlp_ratio=4.0, num_heads=3,
    depth=4, depth_single_blocks=8, axes_dim=[16, 24, 24], theta=10000, patch_size=1, qkv_bias=True,
    guidance_embed=False, txt_ids_dims=[],
)
TOKENS = 8  # context tokens a kind


def build(config=CONFIG, seed=0):
    """Flux in fp32 with weights drawn from `seed`; every block and the output begin at zero (adaLN-Zero)."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    model = Flux(**config, dtype=torch.float32, device="cpu", operations=disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("query_norm.weight", "key_norm.weight")):
            nn.init.ones_(parameter)
        elif parameter.ndim < 2 or "mod.lin" in name or "modulation" in name or name == "final_layer.linear.weight":
            nn.init.zeros_(parameter)
        elif name.startswith(("time_in", "vector_in")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model


def linear(layer, x, rows=None):
    """`layer` computed in the type of x; `rows` reorders its outputs."""
    weight, bias = (layer.weight, layer.bias) if rows is None else (layer.weight[rows], layer.bias[rows])
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


class FlowTransformer(nn.Module):
    """Flux, learned context tokens (kinds, TOKENS, context_in_dim) and a pooled vector a kind (kinds, vec_in_dim).

    The first kind is the empty one; its pooled vector is zero, which is what Flux takes when none is given.
    """

    def __init__(self, kinds, config=CONFIG, seed=0):
        super().__init__()
        self.config = config
        self.flux = build(config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.context = nn.Parameter(0.5 * torch.randn(kinds, TOKENS, config["context_in_dim"], generator=generator))
        self.named_pooled = nn.Parameter(0.5 * torch.randn(kinds - 1, config["vec_in_dim"], generator=generator))
        # Rotary pairs lie side by side in Flux's weights. Both of a pair in separate halves are much faster to
        # turn, and a scalar product doesn't see the order: rows of q and k are reordered on the fly.
        head = config["hidden_size"] // config["num_heads"]
        order = torch.arange(head).view(-1, 2).T.flatten()
        heads = torch.arange(config["num_heads"])[:, None] * head
        one = (heads + order).flatten()
        hidden = config["hidden_size"]
        rest = torch.arange(2 * hidden, 3 * hidden + int(hidden * config["mlp_ratio"]))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("rows", torch.cat([one, one + hidden, rest]), persistent=False)
        self.turns = {}

    @property
    def pooled(self):
        return torch.cat([torch.zeros_like(self.named_pooled[:1]), self.named_pooled])

    def rotations(self, h, w, device, dtype):
        """cos and sin (TOKENS + h w, head dim / 2) of Flux's positions: text at 0, image cells at (0, row, column)."""
        key = h, w, device, dtype
        if key not in self.turns:
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            cells = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
            positions = torch.cat([torch.zeros(TOKENS, 3, dtype=cells.dtype), cells]).double()
            angles = torch.cat([positions[:, i, None] * self.config["theta"] ** (-torch.arange(0, d, 2).double() / d)
                                for i, d in enumerate(self.config["axes_dim"])], 1)
            self.turns[key] = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        return self.turns[key]

    def turned(self, x, scale, turn):
        """QK-norm and rotation of x (B, heads, N, head dim), its dimensions in the order of `order`."""
        x = F.rms_norm(x, x.shape[-1:], scale[self.order].to(x.dtype), 1e-6)
        cos, sin = turn
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def heads(self, qkv, norm, turn):
        batch, count, _ = qkv.shape
        q, k, v = qkv.view(batch, count, 3, self.config["num_heads"], -1).permute(2, 0, 3, 1, 4)
        return self.turned(q, norm.query_norm.weight, turn), self.turned(k, norm.key_norm.weight, turn), v

    def attend(self, q, k, v):
        if q.is_cuda:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:  # a CPU's fused kernel takes twice as long there and back at these sizes
            attended = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v
        return attended.transpose(1, 2).flatten(2)

    def modulation(self, lin, vec):
        return linear(lin, F.silu(vec))[:, None].chunk(lin.out_features // self.config["hidden_size"], -1)

    def modulated(self, x, scale, shift):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)

    def double(self, block, image, text, vec, turn):
        streams, parts = (("txt", text), ("img", image)), []
        modulations = {name: self.modulation(getattr(block, f"{name}_mod").lin, vec) for name, _ in streams}
        for name, x in streams:
            shift, scale, *_ = modulations[name]
            attention = getattr(block, f"{name}_attn")
            qkv = linear(attention.qkv, self.modulated(x, scale, shift), self.rows[: attention.qkv.out_features])
            piece = slice(None, TOKENS) if name == "txt" else slice(TOKENS, None)
            parts.append(self.heads(qkv, attention.norm, (turn[0][piece], turn[1][piece])))
        attended = self.attend(*(torch.cat(pair, 2) for pair in zip(*parts)))
        out = {}
        for (name, x), y in zip(streams, (attended[:, :TOKENS], attended[:, TOKENS:])):
            _, _, gate, shift, scale, gate_mlp = modulations[name]
            x = x + gate * linear(getattr(block, f"{name}_attn").proj, y)
            mlp = getattr(block, f"{name}_mlp")
            hidden = F.gelu(linear(mlp[0], self.modulated(x, scale, shift)), approximate="tanh")
            out[name] = x + gate_mlp * linear(mlp[2], hidden)
        return out["img"], out["txt"]

    def single(self, block, x, vec, turn):
        shift, scale, gate = self.modulation(block.modulation.lin, vec)
        both = linear(block.linear1, self.modulated(x, scale, shift), self.rows)
        qkv, mlp = both.split([3 * self.config["hidden_size"], block.mlp_hidden_dim], -1)
        attended = self.attend(*self.heads(qkv, block.norm, turn))
        return x + gate * linear(block.linear2, torch.cat([attended, F.gelu(mlp, approximate="tanh")], -1))

    def forward(self, x, t, kind, dtype=torch.float32):
        """Velocity (B, 16, h, w) in float32 of x = (1 - t) z + t eps; t (B) in 0..1; kind (B) index; computed in `dtype`."""
        from comfy.ldm.flux.layers import timestep_embedding

        flux = self.flux
        h, w = x.shape[-2:]
        turn = self.rotations(h, w, x.device, dtype)
        vec = linear(flux.time_in.out_layer, F.silu(linear(flux.time_in.in_layer, timestep_embedding(t, 256).to(dtype))))
        pooled = self.pooled[kind].to(dtype)
        vec = vec + linear(flux.vector_in.out_layer, F.silu(linear(flux.vector_in.in_layer, pooled)))
        image = linear(flux.img_in, x.flatten(2).transpose(1, 2).to(dtype))
        text = linear(flux.txt_in, self.context[kind].to(dtype))
        for block in flux.double_blocks:
            image, text = self.double(block, image, text, vec, turn)
        joint = torch.cat([text, image], 1)
        for block in flux.single_blocks:
            joint = self.single(block, joint, vec, turn)
        shift, scale = self.modulation(flux.final_layer.adaLN_modulation[1], vec)
        out = linear(flux.final_layer.linear, self.modulated(joint[:, TOKENS:], scale, shift).float())
        return out.transpose(1, 2).unflatten(2, (h, w))
