import logging
import math

import pytest
import torch
from pastiche.nodes.algorithms.styleid import injected_query
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.host.injections.style import inject_style
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

LAYERS = {"sd15": "6-11", "sd20": "6-11", "sdxl": "0-5"}


class Scene:
    """A content and a style, inverted on a small random model, ready to be injected."""

    def __init__(self, family="sd15", steps=3, size=(8, 8), style_size=(8, 12), batch=1, style_batch=1, memory="recompute",
                 streams="self_attention", precision="full", prediction="eps"):
        self.model = tiny_unet(family, prediction)
        self.sigmas = schedule(self.model, steps)
        self.positive = tiny_cond(self.model)
        self.layers = LAYERS[family]

        def prepare(size, batch, seed):
            noise, trajectory = invert(self.model, {"samples": random_latent(*size, batch=batch, seed=seed)}, self.sigmas, self.positive, "next")
            return noise["samples"], trajectory, capture(self.model, trajectory, streams, self.layers, memory, precision)

        self.noise, self.trajectory, self.content = prepare(size, batch, 1)
        self.style_noise, _, self.style = prepare(style_size, style_batch, 2)

    def inject(self, **options):
        settings = dict(style=self.style, content=self.content, gamma=0.75, temperature=1.5, strength=1.0, layers=self.layers,
                        start_percent=0.0, end_percent=1.0, mask=None)
        return inject_style(self.model, **(settings | options))

    def sample(self, model, noise=None, **options):
        return sample(model, self.noise if noise is None else noise, self.sigmas, options.pop("positive", self.positive), **options)


@pytest.fixture(scope="module")
def scene():
    return Scene()


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def explicit_style_attention(q, k, v, q_content, k_style, v_style, gamma, tau, heads):
    """softmax(tau Q' K_s^T / sqrt(d)) V_s with Q' = gamma Q_c + (1 - gamma) Q, head by head, in float64."""
    query = gamma * q_content + (1 - gamma) * q
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = tau * query[..., part] @ k_style[..., part].transpose(1, 2) / math.sqrt(width)
        outputs.append(torch.softmax(logits, -1) @ v_style[..., part])
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("tokens, style_tokens", [(16, 16), (15, 24)])
def test_pre_projection_equals_explicit_attention_in_float64(heads, tokens, style_tokens):
    """On ComfyUI's own transformer block, with the patch's arithmetic before to_q, to_k, to_v."""
    import comfy.ops
    from comfy.ldm.modules.attention import CrossAttention

    generator = torch.Generator().manual_seed(0)
    attention = CrossAttention(32, heads=heads, dim_head=32 // heads, dtype=torch.float64, operations=comfy.ops.disable_weight_init)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 6
    n, n_content = (torch.randn(2, tokens, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    n_style = torch.randn(2, style_tokens, 32, generator=generator, dtype=torch.float64)
    got = attention(injected_query(n, n_content, 0.75, 1.5), context=n_style, value=n_style)
    to_q, to_k, to_v = attention.to_q, attention.to_k, attention.to_v
    expected = attention.to_out(explicit_style_attention(to_q(n), to_k(n), to_v(n), to_q(n_content), to_k(n_style), to_v(n_style), 0.75, 1.5, heads))
    assert (got - expected).abs().max() < 1e-10
    assert (attention(n) - expected).abs().max() > 1e-2


def test_pre_projection_equals_explicit_attention_through_the_whole_unet_in_float64():
    """ComfyUI's own U-Net, layers 6-11, a style of another size: the two forms differ by rounding only."""
    network = tiny_unet(dtype=torch.float64).model.diffusion_model
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    context, t = random(1, 7, 32), torch.tensor([400.0])
    features = {}

    def run(x, **patches):
        return network(x, t, context=context, transformer_options=patches)

    def remember(name):
        def patch(n, context, value, options):
            features[name, options["block"]] = n
            return n, context, value

        return {"patches": {"attn1_patch": [patch]}}

    x = random(1, 4, 8, 8)
    run(random(1, 4, 8, 12), **remember("style"))
    run(random(1, 4, 8, 8), **remember("content"))

    def chosen(options):
        return options["block"][0] == "output" and options["block"][1] >= 6

    def hidden(n, context, value, options):
        if not chosen(options):
            return n, context, value
        style = features["style", options["block"]]
        return injected_query(n, features["content", options["block"]], 0.75, 1.5), style, style

    def explicit(q, k, v, options):
        attention = network.output_blocks[options["block"][1]][1].transformer_blocks[0].attn1
        content, style = features["content", options["block"]], features["style", options["block"]]
        return explicit_style_attention(
            q, k, v, attention.to_q(content), attention.to_k(style), attention.to_v(style), 0.75, 1.5, options["n_heads"]
        )

    a = run(x, patches={"attn1_patch": [hidden]})
    b = run(x, patches_replace={"attn1": {("output", number, 0): explicit for number in range(6, 12)}})
    assert (a - b).abs().max() < 1e-10
    assert (a - run(x)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
def test_hidden_state_and_explicit_projections_agree_through_the_sampler(family):
    prediction = "v" if family == "sd20" else "eps"
    hidden = Scene(family, steps=2, prediction=prediction)
    explicit = Scene(family, steps=2, streams="self_attention_qkv", memory="ram", prediction=prediction)
    a, b = hidden.sample(hidden.inject()), explicit.sample(explicit.inject())
    assert close(a, b)
    assert not close(a, hidden.sample(hidden.model), 1e-2)


@pytest.mark.parametrize("size, style_size", [((7, 10), (9, 5)), ((8, 8), (8, 8))])
def test_odd_sizes_and_other_style_sizes(size, style_size):
    scene = Scene(size=size, style_size=style_size, steps=2)
    assert torch.isfinite(scene.sample(scene.inject())).all()


@pytest.mark.parametrize("memory, precision", [("ram", "full"), ("vram", "full"), ("disk", "full"), ("ram", "half"), ("disk", "half")])
def test_memory_modes_give_the_same_image(memory, precision):
    reference = Scene(memory="recompute")
    other = Scene(memory=memory, precision=precision)
    expected, got = reference.sample(reference.inject()), other.sample(other.inject())
    if precision == "full":
        assert close(got, expected)
    else:
        mse = float((got - expected).square().mean())
        assert 10 * math.log10(float(expected.max() - expected.min()) ** 2 / mse) > 45


def predictions(scene, model):
    """Denoised latent of each step."""
    seen = []
    scene.sample(model, callback=lambda step, denoised, x, total: seen.append(denoised.clone()))
    return seen


def test_own_features_gamma_1_and_temperature_1_change_nothing(scene):
    """At the first step the sample is the captured latent; a random U-Net is too chaotic to compare later ones."""
    own = scene.inject(style=scene.content, gamma=1.0, temperature=1.0)
    plain = predictions(scene, scene.model)[0]
    assert close(predictions(scene, own)[0], plain)
    assert not close(predictions(scene, scene.inject(style=scene.content, gamma=1.0, temperature=1.5))[0], plain, 1e-3)


@pytest.mark.parametrize(
    "options",
    [dict(strength=0.0), dict(start_percent=0.5, end_percent=0.5), dict(start_percent=0.9, end_percent=0.1), dict(mask=torch.zeros(1, 64, 64))],
)
def test_identity_is_bit_for_bit(scene, options):
    assert torch.equal(scene.sample(scene.inject(**options)), scene.sample(scene.model))


def test_steps_outside_the_range_are_untouched_bit_for_bit(scene):
    """Injection from the second step on leaves the first step's prediction as it was."""
    plain, late = predictions(scene, scene.model), predictions(scene, scene.inject(start_percent=0.1))
    assert torch.equal(plain[0], late[0])
    assert not torch.equal(plain[1], late[1])


def test_mask_of_ones_equals_no_mask_and_half_strength_lies_between(scene):
    full = scene.sample(scene.inject())
    assert close(scene.sample(scene.inject(mask=torch.ones(1, 64, 64))), full)
    single = Scene(steps=1)
    plain, styled, half = (single.sample(m) for m in (single.model, single.inject(), single.inject(strength=0.5)))
    assert not close(half, plain, 1e-3) and not close(half, styled, 1e-3)


def test_zero_part_of_a_mask_batch_stays_plain():
    scene = Scene(batch=2, steps=2)
    mask = torch.zeros(2, 64, 64)
    mask[1] = 1
    masked = scene.sample(scene.inject(mask=mask))
    assert torch.equal(masked[:1], scene.sample(scene.model)[:1])
    assert close(masked[1:], scene.sample(scene.inject())[1:])


@pytest.mark.parametrize("style_batch", [1, 2])
def test_batch_equals_single_runs(style_batch):
    scene = Scene(batch=2, style_batch=style_batch, steps=2)
    together = scene.sample(scene.inject())
    for i in range(2):
        # single runs: invert and capture each image on its own
        def bank(seed, batch, size, index):
            latent = random_latent(*size, batch=batch, seed=seed)[index : index + 1]
            noise, trajectory = invert(scene.model, {"samples": latent}, scene.sigmas, scene.positive, "next")
            return noise["samples"], capture(scene.model, trajectory, "self_attention", scene.layers)

        noise, content = bank(1, 2, (8, 8), i)
        _, style = bank(2, style_batch, (8, 12), min(i, style_batch - 1))
        alone = scene.sample(scene.inject(style=style, content=content), noise=noise)
        assert close(together[i : i + 1], alone, 1e-4)


def test_guidance_with_conditions_in_one_batch_or_apart_is_the_same(scene, monkeypatch):
    negative = tiny_cond(scene.model, seed=5)
    patched = scene.inject()
    together = scene.sample(patched, negative=negative, cfg=3.0)
    monkeypatch.setattr(type(scene.model), "get_free_memory", lambda self, device: 0)  # nothing fits: one by one
    assert close(scene.sample(patched, negative=negative, cfg=3.0), together)


def test_conditions_of_different_token_length(scene):
    longer = tiny_cond(scene.model, tokens=14, seed=5)
    assert torch.isfinite(scene.sample(scene.inject(), negative=longer, cfg=2.0)).all()
    several = scene.positive + tiny_cond(scene.model, tokens=21, seed=6)
    assert torch.isfinite(scene.sample(scene.inject(), positive=several, negative=longer, cfg=2.0)).all()


def test_other_patches_are_chained(scene):
    """A pack's attn1_patch, attn1_replace and attention override still run, with ours."""
    calls = {"patch": 0, "replace": 0, "override": 0}
    from comfy.ldm.modules.attention import optimized_attention

    def patch(n, context, value, options):
        calls["patch"] += 1
        return n, context, value

    def replace(q, k, v, options):
        calls["replace"] += 1
        return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

    def override(func, *args, **kwargs):
        calls["override"] += 1
        return func(*args, **kwargs)

    explicit = Scene(streams="self_attention_qkv", memory="ram")
    for source in (scene, explicit):
        expected = source.sample(source.inject())
        calls.update(patch=0, replace=0, override=0)
        theirs = source.model.clone()
        theirs.set_model_attn1_patch(patch)
        theirs.set_model_attn1_replace(replace, "output", 7)
        theirs.model_options["transformer_options"]["optimized_attention_override"] = override
        settings = dict(style=source.style, content=source.content, gamma=0.75, temperature=1.5, strength=1.0, layers=source.layers,
                        start_percent=0.0, end_percent=1.0, mask=None)
        assert close(source.sample(inject_style(theirs, **settings)), expected)
        assert all(calls.values())
        halved = source.sample(inject_style(theirs, **(settings | {"strength": 0.5})))
        assert close(halved, source.sample(source.inject(strength=0.5)))


def test_a_later_replacement_is_named(caplog):
    """After this node another's replacement wins, and the log says where; one for a whole block is chained."""
    explicit = Scene(streams="self_attention_qkv", memory="ram")
    expected, seen = explicit.sample(explicit.inject()), []

    def replace(q, k, v, options):
        from comfy.ldm.modules.attention import optimized_attention

        seen.append(options["block"])
        return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

    for slot, lost in ((("output", 7, 0), True), (("output", 7), False)):
        patched = explicit.inject()
        patched.set_model_attn1_replace(replace, *slot)
        caplog.clear(), seen.clear()
        with caplog.at_level(logging.WARNING):
            result = explicit.sample(patched)
        assert ("after Style Injection replaced attn1 of output 7, so nothing" in caplog.text) is lost
        assert close(result, expected) is not lost and set(seen) == {("output", 7)}


def test_requeue_is_identical_and_the_model_untouched(scene):
    patched = scene.inject()
    first = scene.sample(patched)
    assert torch.equal(scene.sample(patched), first)
    assert torch.equal(scene.sample(scene.inject()), first)
    assert not scene.model.wrappers and "patches" not in scene.model.model_options["transformer_options"]


def test_cancel_and_errors_leave_no_state_behind(scene):
    import comfy.model_management as management

    patched = scene.inject()

    def stop(step, denoised, x, total):
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        scene.sample(patched, callback=stop)
    assert torch.equal(scene.sample(patched), scene.sample(scene.inject()))


def test_a_lora_in_between_computes_the_reference_with_the_original_weights(scene, caplog):
    """recompute under a LoRA equals features kept in RAM from the unpatched model, in half precision both."""
    kept = Scene(memory="ram", precision="half")
    outputs = []
    for source in (scene, kept):
        lora = source.model.clone()
        key = "diffusion_model.output_blocks.8.1.transformer_blocks.0.attn1.to_q.weight"
        lora.add_patches({key: ("diff", (0.2 * torch.ones(32, 32),))})
        patched = inject_style(lora, source.style, source.content, 0.75, 1.5, 1.0, source.layers, 0.0, 1.0, None)
        with caplog.at_level(logging.INFO):
            outputs.append(source.sample(patched))
    assert "weights differ" in caplog.text
    assert close(*outputs)
    assert not close(outputs[0], scene.sample(scene.inject()), 1e-3)


def test_second_order_sampler_takes_the_nearest_step_and_says_so_once(scene, caplog):
    with caplog.at_level(logging.INFO):
        out = scene.sample(scene.inject(), sampler="dpm_2")
    assert torch.isfinite(out).all()
    assert 1 <= caplog.text.count("using the nearest captured step") <= 2  # once for each bank


def test_an_injected_model_is_not_captured(scene):
    with pytest.raises(ValueError, match="already carries Style Injection, which would be captured too"):
        capture(scene.inject(), scene.trajectory, "self_attention", "6")


def test_refusals_say_what_to_connect(scene):
    other = tiny_unet(seed=9)
    with pytest.raises(ValueError, match="made with another model"):
        inject_style(other, scene.style, scene.content, 0.75, 1.5, 1.0, "6-11", 0.0, 1.0, None)
    with pytest.raises(ValueError, match=r"content: its latent is 8x8, the sampled one 10x8"):
        scene.sample(scene.inject(), noise=random_latent(8, 10))
    with pytest.raises(ValueError, match="captured on another schedule.*Connect the same SIGMAS"):
        sample(scene.inject(), scene.noise, schedule(scene.model, 5), scene.positive)
    with pytest.raises(ValueError, match="output 3.*Set Capture Features to streams"):
        scene.inject(layers="3-11")
    with pytest.raises(ValueError, match="style: 2 images cannot be shared among 3"):
        two = Scene(style_batch=2, steps=1)
        two.sample(two.inject(content=None), noise=random_latent(batch=3))
    with pytest.raises(ValueError, match="2 masks for 1 samples"):
        scene.sample(scene.inject(mask=torch.ones(2, 8, 8)))


def test_the_level_at_which_a_split_schedule_ends_need_not_be_captured(scene):
    """Euler arrives there without asking the model."""
    sigmas = torch.cat([scene.sigmas[:2], 0.8 * scene.sigmas[1:2]])
    result = sample(scene.inject(), scene.noise, sigmas, scene.positive)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("streams", ["self_attention", "self_attention_qkv"])
def test_a_gamma_schedule_is_another_gamma_at_every_step(streams):
    """Linear from 0.9 to 0.1 over three steps: three injections of constant gamma, each in one step's range."""
    scene = Scene(steps=3, streams=streams)
    sampling = scene.model.get_model_object("model_sampling")
    middles = [(a + b) / 2 for a, b in zip(scene.sigmas[:-1], scene.sigmas[1:])]
    ends = [0.0, *(1 - float(sampling.timestep(sigma)) / 999 for sigma in middles[:2]), 1.0]
    chained = scene.model
    for gamma, start, end in zip((0.9, 0.5, 0.1), ends[:3], ends[1:]):
        chained = inject_style(chained, scene.style, scene.content, gamma, 1.5, 1.0, scene.layers, start, end, None)
    expected = scene.sample(chained)
    assert close(scene.sample(scene.inject(gamma=0.9, gamma_end=0.1, schedule="linear")), expected, 1e-5)
    assert not close(scene.sample(scene.inject(gamma=0.9)), expected, 1e-3)


def test_a_schedule_to_the_same_gamma_is_the_constant_one_bit_for_bit(scene):
    assert torch.equal(scene.sample(scene.inject(gamma_end=0.75, schedule="linear")), scene.sample(scene.inject()))
    assert torch.equal(scene.sample(scene.inject(gamma_end=0.1, schedule="constant")), scene.sample(scene.inject()))
