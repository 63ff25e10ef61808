import logging
import uuid
from dataclasses import replace

import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.host.injections.schedule import Schedule
from pastiche.nodes.host.networks.adapter import RUN
from pastiche.nodes.sockets import Trajectory

STREAMS = "residual, self_attention_qk, cross_attention"
LAYERS = {"sd15": "3-11", "sd20": "3-11", "sdxl": "0-5"}


class Content:
    """A trajectory that is the path of a sampling, so that reconstructing it is exact however chaotic the model."""

    def __init__(self, family="sd15", steps=4, size=(8, 8), batch=1, memory="ram", tokens=7, streams=STREAMS):
        self.model = tiny_unet(family)
        self.sigmas = schedule(self.model, steps)
        self.positive = tiny_cond(self.model, tokens)
        self.noise = random_latent(*size, batch=batch, seed=1)
        path = []
        self.result = sample(self.model, self.noise, self.sigmas, self.positive, callback=lambda i, x0, x, n: path.append(x.clone()))
        levels = torch.stack([*path, self.model.model.process_latent_in(self.result)]).flip(0).float().cpu()
        self.trajectory = Trajectory(self.sigmas.flip(0), levels, self.positive, "next", fingerprint(self.model))
        self.layers = LAYERS[family]
        self.bank = capture(self.model, self.trajectory, streams, self.layers, memory, "full")

    def inject(self, model=None, bank=None, **options):
        settings = dict(feature_steps=1.0, attention_steps=1.0, feature_layers=self.layers, self_attention_layers="auto",
                        cross_attention_layers="auto", mode="override")
        return inject_features(model or self.model, bank or self.bank, **(settings | options))

    def sample(self, model, noise=None, positive=None, **options):
        return sample(model, self.noise if noise is None else noise, self.sigmas, positive or self.positive, **options)


@pytest.fixture(scope="module")
def content():
    return Content()


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def with_lora(model, seed=3, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, module in model.model.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            lora[f"{name}.lora_down.weight"] = torch.randn(2, module.in_features, generator=generator) / 4
            lora[f"{name}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=generator) * scale
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]


def test_shares_of_nothing_are_identity(content):
    other = random_latent(seed=5)
    plain = content.sample(content.model, other)
    for options in ({"feature_steps": 0.0, "attention_steps": 0.0},
                    {"feature_layers": "none", "self_attention_layers": "none", "cross_attention_layers": "none"}):
        injected = content.inject(**options)
        assert not injected.model_options["transformer_options"] and injected.wrappers == content.model.wrappers
        assert torch.equal(content.sample(injected, other), plain)


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
@pytest.mark.parametrize("mode", ["override", "blend"])
def test_everything_injected_reconstructs_the_content(family, mode):
    """Shares 1, all layers, same prompt, no LoRA: the content's own path."""
    content = Content(family, size=(8, 16))
    assert distance(content.sample(content.inject(mode=mode)), content.result) < 1e-5


def test_every_memory_injects_the_same(content, tmp_path):
    noise = random_latent(seed=5)
    expected = content.sample(content.inject(), noise)
    assert distance(expected, content.sample(content.model, noise)) > 1e-2
    recomputed = capture(content.model, content.trajectory, STREAMS, content.layers, "recompute")
    assert distance(content.sample(content.inject(bank=recomputed), noise), expected) < 1e-5


def test_a_lora_model_gets_the_original_models_attention(content):
    """Queries and keys are the plain model's: a LoRA of to_q and to_k alone changes nothing where they are injected."""
    everywhere = capture(content.model, content.trajectory, "self_attention_qk, cross_attention",
                         "input 1-2, input 4-5, input 7-8, middle, output 3-11", "ram", "full")
    layers = "input 1-2, input 4-5, input 7-8, middle, output 3-11"
    options = {"bank": everywhere, "feature_steps": 0, "self_attention_layers": layers, "cross_attention_layers": layers}
    lora, noise = with_lora(content.model), random_latent(seed=5)
    values, q_and_k = content.model.clone(), content.model.clone()
    for part, model in ((True, values), (False, q_and_k)):
        model.patches = {key: patches for key, patches in lora.patches.items() if ("to_v" in key) == part}
        model.patches_uuid = uuid.uuid4()
    plain = content.sample(content.inject(**options), noise)
    assert distance(content.sample(q_and_k, noise), content.sample(content.model, noise)) > 1e-2
    assert distance(content.sample(content.inject(q_and_k, **options), noise), plain) < 1e-5
    styled = content.sample(content.inject(lora, **options), noise)
    assert distance(styled, content.sample(content.inject(values, **options), noise)) < 1e-5
    assert distance(styled, plain) > 1e-2
    recomputed = capture(content.model, content.trajectory, "self_attention_qk, cross_attention", layers, "recompute")
    again = content.sample(content.inject(lora, **(options | {"bank": recomputed})), noise)
    assert distance(again, styled) < 1e-2  # made once for the run, in half precision


def test_override_of_queries_and_keys_is_override_of_maps_in_float64():
    """On ComfyUI's own attention: q, k of the content with the sample's values, against the content's softmax map."""
    import comfy.ops
    from comfy.ldm.modules.attention import BasicTransformerBlock

    generator = torch.Generator().manual_seed(0)
    block = BasicTransformerBlock(32, 4, 8, context_dim=16, dtype=torch.float64, operations=comfy.ops.disable_weight_init)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 5
    sample_x, content_x = torch.randn(2, 1, 12, 32, generator=generator, dtype=torch.float64)
    prompt, empty = torch.randn(2, 1, 5, 16, generator=generator, dtype=torch.float64)
    kept, maps = {}, {}

    def heads(t):
        return t.view(1, -1, 4, 8).transpose(1, 2)

    def run(x, context, replace):
        slots = {kind: {("output", 3, 0): replace(kind)} for kind in ("attn1", "attn2")}
        return block(x, context, {"block": ("output", 3), "block_index": 0, "patches_replace": slots})

    def record(kind):
        def keep(q, k, v, options):
            kept[kind] = q, k
            maps[kind] = torch.softmax(heads(q) @ heads(k).transpose(2, 3) / 8**0.5, dim=-1)
            return (maps[kind] @ heads(v)).transpose(1, 2).reshape(1, -1, 32)
        return keep

    run(content_x, empty, record)
    by_map = run(sample_x, prompt, lambda kind: lambda q, k, v, o: (maps[kind] @ heads(v)).transpose(1, 2).reshape(1, -1, 32))

    from pastiche.nodes.host.injections import content as feature_injection

    class Injection(feature_injection.ContentPatches):
        def __init__(self, pair):
            self.pair, self.attention_steps, self.mode = pair, 1.0, "override"
            self.schedule = Schedule(torch.tensor([1.0, 0.0]))

        def _fitting(self, stream, slot, options, like):
            return self.pair[stream.endswith("k")]

    class Run:
        replaced_attention = staticmethod(lambda *_: None)

    slot, options = ("output", 3, 0), {"block": ("output", 3), "block_index": 0, RUN: Run(), "sigmas": torch.ones(1)}
    slots = {"attn1": {slot: Injection(kept["attn1"]).replacement(slot, attend)}, "attn2": {slot: attend}}
    crossed = Injection(kept["attn2"])
    hooks = [
        getattr(block.attn2, f"to_{name}").register_forward_hook(
            lambda module, args, out, name=name: crossed.cross_projection(slot, name, out, options)
        ) for name in ("q", "k")
    ]
    by_query = block(sample_x, prompt, {**options, "patches_replace": slots})
    for hook in hooks:
        hook.remove()
    assert (by_query - by_map).abs().max() < 1e-12
    assert (by_query - run(sample_x, prompt, record)).abs().max() > 1e-2


def test_shares_count_steps(content, monkeypatch):
    from pastiche.nodes.host.injections.content import ContentPatches

    due = []
    original = ContentPatches._feature
    monkeypatch.setattr(ContentPatches, "_feature", lambda self, stream, place, options, like: (
        due.append((stream.split("_")[0], float(options["sigmas"][0]))), original(self, stream, place, options, like))[1])
    content.sample(content.inject(feature_steps=0.5, attention_steps=0.25))
    steps = lambda kind: len({sigma for stream, sigma in due if stream == kind})
    assert (steps("residual"), steps("self"), steps("cross")) == (2, 1, 1)  # of 4
    assert max(sigma for _, sigma in due) == pytest.approx(float(content.sigmas[0]))


def test_batches_guidance_and_contents_of_their_own():
    pair = Content(batch=2)
    negative = tiny_cond(pair.model, seed=4)
    noise = random_latent(batch=2, seed=5)
    together = pair.sample(pair.inject(), noise, negative=negative, cfg=3.0)
    for row in range(2):
        one = replace(pair.trajectory, latents=pair.trajectory.latents[:, row : row + 1])
        bank = capture(pair.model, one, STREAMS, pair.layers, "ram", "full")
        alone = pair.sample(pair.inject(bank=bank), noise[row : row + 1], negative=negative, cfg=3.0)
        assert distance(together[row : row + 1], alone) < 1e-4
        shared = pair.sample(pair.inject(bank=bank), noise, negative=negative, cfg=3.0)  # one content, two samples
        assert distance(shared[row : row + 1], alone) < 1e-4


def test_cross_attention_with_longer_prompts(content):
    double = tiny_cond(content.model, tokens=14, seed=2)
    assert torch.isfinite(content.sample(content.inject(), positive=double)).all()
    with pytest.raises(ValueError, match="has 7 tokens, the sample 5.*cross_attention_layers to none"):
        content.sample(content.inject(), positive=tiny_cond(content.model, tokens=5))
    content.sample(content.inject(cross_attention_layers="none"), positive=tiny_cond(content.model, tokens=5))


def attend(q, k, v, options):
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, options["n_heads"])


def test_other_nodes_replacements(content, caplog):
    """Before this node they attend with the content's queries and keys; after it they win, and the log says where."""
    noise, seen = random_latent(seed=5), []
    expected = content.sample(content.inject(), noise)

    def other(q, k, v, options):
        seen.append(options["block"])
        return attend(q, k, v, options)

    for slot in (("output", 5, 0), ("output", 5)):
        patched = content.model.clone()
        patched.set_model_attn1_replace(other, *slot)
        assert distance(content.sample(content.inject(patched), noise), expected) < 1e-5
        assert len(seen) == 4 and set(seen) == {("output", 5)}
        seen.clear()
    after = content.inject()
    after.set_model_attn1_replace(other, "output", 5, 0)
    with caplog.at_level(logging.WARNING):
        result = content.sample(after, noise)
    assert "replaced attn1 of output 5, so nothing is injected there" in caplog.text
    assert distance(result, expected) > 1e-3
    caplog.clear()
    twice = content.inject(content.inject(feature_layers="none"), self_attention_layers="none", cross_attention_layers="none")
    with caplog.at_level(logging.WARNING):
        assert distance(content.sample(twice, noise), expected) < 1e-5
    assert "nothing is injected there" not in caplog.text


def test_other_nodes_residual_handlers(content, caplog):
    calls = []

    def handler(layer, x, emb, *rest):
        calls.append(rest[1]["block"])
        return layer(x, emb)

    patched = content.model.clone()
    patched.set_model_patch((ResBlock, handler), "forward_timestep_embed_patch")
    with caplog.at_level(logging.WARNING):
        assert distance(content.sample(content.inject(patched)), content.result) < 1e-5
    assert "in output 3, output 4" in caplog.text
    assert ("middle", 0) in calls and ("output", 2) in calls and ("output", 4) not in calls


def test_refusals(content):
    with pytest.raises(ValueError, match='mode: got "mix"'):
        content.inject(mode="mix")
    with pytest.raises(ValueError, match="made with another model"):
        content.inject(tiny_unet(seed=1))
    bare = capture(content.model, content.trajectory, "self_attention_qk", "4-6", "recompute")
    with pytest.raises(ValueError, match="lack residual of output 3, output 4.*cross_attention of output 3"):
        content.inject(bank=bare)
    with pytest.raises(ValueError, match="lack self_attention_qk of output 7"):
        content.inject(bank=bare, self_attention_layers="4-7", feature_steps=0, cross_attention_layers="none")
    assert content.inject(bank=bare, feature_steps=0, cross_attention_layers="none")
    with pytest.raises(ValueError, match="content: its latent is 8x8, the sampled one 16x8"):
        content.sample(content.inject(), random_latent(8, 16))
    with pytest.raises(ValueError, match="another schedule"):
        sample(content.inject(), content.noise, schedule(content.model, 7), content.positive)


def test_nothing_stays_behind(content):
    noise = random_latent(seed=5)
    plain, injected = content.sample(content.model, noise), content.inject()
    first = content.sample(injected, noise)
    assert torch.equal(content.sample(injected, noise), first)
    assert torch.equal(content.sample(content.model, noise), plain)
