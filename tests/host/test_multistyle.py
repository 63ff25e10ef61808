import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from support.models import tiny_cond, tiny_unet
from support.styles import SIZE, Loop, masks, merged, oracle_merges_in_float32, plain, random_lora, sample  # noqa: F401

from pastiche.nodes.host.multistyle.guider import MultiStyleGuider, multi_style_guider
from pastiche.nodes.sockets import StyleEntry


def test_equals_a_loop_over_patched_models():
    """Eq. 7, guidance and negative prompt, overlapping soft masks, ranks that differ: 1e-5 of the largest value."""
    from pastiche.nodes.algorithms.diffstyler import normalise_masks
    from pastiche.nodes.algorithms.masks import resize_mask

    model = tiny_unet()
    loras = [random_lora(model, 1, 4), random_lora(model, 2, 2), random_lora(model, 3, 3, ("to_out", "0", "proj"))]
    prompts = [tiny_cond(model, seed=i) for i in range(4)]
    negative = tiny_cond(model, seed=9)
    own = masks(3)
    entries = [StyleEntry(lora=lora, conditioning=prompts[i], mask=own[i]) for i, lora in enumerate(loras)]
    ours = sample(multi_style_guider(model, prompts[3], negative, 3.0, entries))
    weights, rest = normalise_masks(torch.stack([resize_mask(mask, 16, 8) for mask in own]))
    parts = [(merged(model, lora), prompts[i], negative, 3.0, weights[i].unsqueeze(1)) for i, lora in enumerate(loras)]
    expected = sample(Loop(model, [*parts, (model, prompts[3], negative, 3.0, rest.unsqueeze(1))]))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    base = sample(plain(model, prompts[3], negative, 3.0))
    assert (ours - base).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("family, cfg", [("sd15", 1.0), ("sd20", 4.0), ("sdxl", 4.0)])
def test_one_style_everywhere_is_that_lora_alone(family, cfg):
    model = tiny_unet(family)
    lora, positive, negative = random_lora(model, 1), tiny_cond(model), tiny_cond(model, seed=5)
    entry = StyleEntry(lora=lora, strength=0.7)
    ours = sample(multi_style_guider(model, positive, negative, cfg, [entry]))
    alone = sample(plain(merged(model, lora, 0.7), positive, negative, cfg))
    base = sample(plain(model, positive, negative, cfg))
    assert (alone - base).abs().max() > 1e-2 * base.abs().max()
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("entry", [
    {"mask": torch.zeros(1, 64, 32)}, {"start_percent": 0.6, "end_percent": 0.4}, None, {"strength": 0.0}
])
def test_nothing_to_do_is_the_base_bit_for_bit(entry):
    model = tiny_unet()
    positive, negative = tiny_cond(model), tiny_cond(model, seed=5)
    entries = [] if entry is None else [StyleEntry(lora=random_lora(model, i), **entry) for i in range(2)]
    base = sample(plain(model, positive, negative, 4.0))
    ours = sample(multi_style_guider(model, positive, negative, 4.0, entries))
    if entry == {"strength": 0.0}:  # the style's own rows run, with a LoRA of nothing
        torch.testing.assert_close(ours, base, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, base)


def test_one_forward_a_step():
    model = tiny_unet()
    calls = []
    model.model.diffusion_model.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    entries = [StyleEntry(lora=random_lora(model, i), mask=mask / 4) for i, mask in enumerate(masks(3))]
    sample(multi_style_guider(model, tiny_cond(model), tiny_cond(model, seed=5), 4.0, entries), steps=3)
    assert calls == [16] * 3  # (3 styles + base) x (prompt, negative) x 2 samples


def test_ranges_switch_styles_on_and_off():
    model = tiny_unet()
    rows = []
    model.model.diffusion_model.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    entries = [StyleEntry(lora=random_lora(model, 1), start_percent=0.5), StyleEntry(lora=random_lora(model, 2), end_percent=0.5)]
    sample(multi_style_guider(model, tiny_cond(model), [], 1.0, entries), steps=4)
    assert rows[0] == rows[-1] == SIZE[0]  # one style at a time, everywhere: no base rows


def test_every_kind_of_patch(tmp_path):
    """Convolution LoRAs, biases, norms and full differences beside plain ones: against core's merge."""
    model = tiny_unet()
    lora = random_lora(model, 4, 2, ("to_q", "op", "conv", "proj_in", "proj_out", "skip_connection"), 0.2)
    generator = torch.Generator().manual_seed(8)
    network = dict(model.model.named_modules())
    for name, kind in (("middle_block.1.norm", "norm"), ("middle_block.0.in_layers.0", "norm"),
                       ("output_blocks.5.1.transformer_blocks.0.norm1", "norm"), ("out.2", "conv"),
                       ("output_blocks.4.1.transformer_blocks.0.ff.net.2", "linear")):
        module = network[f"diffusion_model.{name}"]
        lora[f"diffusion_model.{name}.diff"] = 0.05 * torch.randn(module.weight.shape, generator=generator)
        lora[f"diffusion_model.{name}.diff_b"] = 0.05 * torch.randn(module.bias.shape, generator=generator)
    for name in ("middle_block.1.transformer_blocks.0.attn1.to_v", "input_blocks.4.1.transformer_blocks.0.attn1.to_v"):
        weight = network[f"diffusion_model.{name}"].weight  # LoHa
        for part, shape in (("hada_w1_a", (weight.shape[0], 2)), ("hada_w1_b", (2, weight.shape[1])),
                            ("hada_w2_a", (weight.shape[0], 2)), ("hada_w2_b", (2, weight.shape[1]))):
            lora[f"diffusion_model.{name}.{part}"] = 0.3 * torch.randn(shape, generator=generator)
    positive = tiny_cond(model)
    other = StyleEntry(lora=random_lora(model, 1), mask=torch.zeros(1, 8, 8))
    ours = sample(multi_style_guider(model, positive, [], 1.0, [other, StyleEntry(lora=lora)]))
    alone = sample(plain(merged(model, lora), positive, [], 1.0))
    assert (ours - alone).abs().max() < 2e-5 * alone.abs().max()


def test_a_model_with_loras_is_a_style():
    model = tiny_unet()
    shared = merged(model, random_lora(model, 7), 0.5)  # below every style
    lora = random_lora(model, 1)
    styled = merged(merged(shared, lora, 0.8), random_lora(model, 2, 3), 0.4)
    positive = tiny_cond(model)
    ours = sample(multi_style_guider(shared, positive, [], 1.0, [StyleEntry(model=styled)]))
    alone = sample(plain(styled, positive, [], 1.0))
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()
    with pytest.raises(ValueError, match="another checkpoint"):
        MultiStyleGuider(tiny_unet(seed=1), [StyleEntry(model=styled)])
    with pytest.raises(ValueError, match="different LoRAs below"):
        MultiStyleGuider(merged(model, random_lora(model, 6)), [StyleEntry(model=styled, name="ink")])


def test_a_styles_model_without_the_guiders_lora_is_refused():
    """It would run with the guider's LoRA."""
    model = tiny_unet()
    with pytest.raises(ValueError, match="ink: its model and the guider's carry different LoRAs below the style's own"):
        MultiStyleGuider(merged(model, random_lora(model, 6)), [StyleEntry(model=model, name="ink")])
    shared = random_lora(model, 6)
    weaker, stronger = merged(model, shared, 0.3), merged(model, shared, 0.6)
    with pytest.raises(ValueError, match="different LoRAs below"):
        MultiStyleGuider(weaker, [StyleEntry(model=stronger)])


def model_with(kind, model):
    """A clone of `model` with one thing that is no LoRA."""
    other = model.clone()
    if kind == "attn2_patch":
        other.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    elif kind == "attn1 replacement":
        other.set_model_attn1_replace(lambda q, k, v, options: v, "middle", 0)
    elif kind == "sampler_post_cfg_function":
        other.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    elif kind == "wrapper":
        other.add_wrapper_with_key("apply_model", "test", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    elif kind == "object patch":
        other.add_object_patch("manual_cast_dtype", torch.bfloat16)
    return other


@pytest.mark.parametrize("kind, word", [
    ("attn2_patch", "attn2_patch of model_with"), ("attn1 replacement", "of model_with"), ("wrapper", "apply_model of model_with"),
    ("sampler_post_cfg_function", "sampler_post_cfg_function of model_with"), ("object patch", "object patch manual_cast_dtype"),
])
def test_a_styles_model_with_more_than_loras_is_refused(kind, word):
    model = tiny_unet()
    with pytest.raises(ValueError, match=f"ink: its model carries more than LoRAs: .*{word}.*connect such nodes to the guider's model"):
        MultiStyleGuider(model, [StyleEntry(model=merged(model_with(kind, model), random_lora(model, 1)), name="ink")])
    shared = model_with(kind, model)  # on the guider's model too: fine
    MultiStyleGuider(shared, [StyleEntry(model=merged(shared, random_lora(model, 1)))])


def test_a_styles_model_with_our_injection_is_named():
    from pastiche.nodes.host.injections.style import inject_style

    model = tiny_unet()
    styled = inject_style(model, featured(model), None, 0.0, 1.5, 1.0, "6-11", 0.0, 1.0, None)
    with pytest.raises(ValueError, match="carries more than LoRAs: Style Injection. All"):
        MultiStyleGuider(model, [StyleEntry(model=styled)])


def test_tensors_without_a_place_are_reported(caplog):
    model = tiny_unet()
    lora = random_lora(model, 1)
    fitting = len(lora)
    for name in ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", "lora_te_text_model_encoder_layers_1_mlp_fc1.alpha"):
        lora[name] = torch.tensor(1.0)
    lora["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"] = torch.zeros(2, 2)
    with caplog.at_level("WARNING"):
        MultiStyleGuider(model, [StyleEntry(lora=lora, name="ink")])
    text, foreign = [record.getMessage() for record in caplog.records if "ink" in record.getMessage()]
    assert f"2 of the LoRA's {fitting + 3} tensors change the text encoder" in text and "lora_te_text_model" in text
    assert f"1 of the LoRA's {fitting + 3} tensors fit no layer" in foreign and "double_blocks_0_img_attn_proj.lora_up" in foreign
    caplog.clear()
    with caplog.at_level("WARNING"):
        MultiStyleGuider(model, [StyleEntry(lora=random_lora(model, 1))])
    assert not [record for record in caplog.records if "LoRA" in record.getMessage()]


def test_foreign_loras_are_refused():
    model = tiny_unet()
    with pytest.raises(ValueError, match="style 1: none of the LoRA's 3 tensors"):
        MultiStyleGuider(model, [StyleEntry(lora={f"double_blocks.0.img_attn.qkv.{k}": torch.zeros(2, 2) for k in "abc"})])
    wide = random_lora(tiny_unet(context_dim=64), 1)
    guider = multi_style_guider(model, tiny_cond(model), [], 1.0, [StyleEntry(lora=wide, name="wide")])
    with pytest.raises(ValueError, match=r"wide: the LoRA's .*attn2.to_k.weight is for a weight of \(32, 64\)"):
        sample(guider)


def test_masks_per_sample_and_wrong_counts():
    model = tiny_unet()
    both = torch.stack([torch.zeros(64, 32), torch.ones(64, 32)])
    lora, positive = random_lora(model, 1), tiny_cond(model)
    ours = sample(multi_style_guider(model, positive, [], 1.0, [StyleEntry(lora=lora, mask=both)]))
    alone, base = sample(plain(merged(model, lora), positive, [], 1.0)), sample(plain(model, positive, [], 1.0))
    torch.testing.assert_close(ours[0], base[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], alone[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 masks for 2 samples"):
        sample(multi_style_guider(model, positive, [], 1.0, [StyleEntry(lora=lora, mask=torch.ones(3, 8, 8))]))


def test_nothing_stays_behind(monkeypatch):
    model = tiny_unet()
    hooks = lambda: sum(len(module._forward_hooks) for module in model.model.modules())
    guider = multi_style_guider(model, tiny_cond(model), [], 1.0, [StyleEntry(lora=random_lora(model, 1))])
    base = sample(plain(model, tiny_cond(model), [], 1.0))
    first = sample(guider)
    assert hooks() == 0 and torch.equal(sample(guider), first)

    def interrupt(step, *_):
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(torch.randn(SIZE), torch.zeros(SIZE), comfy.samplers.sampler_object("euler"),
                      torch.tensor([10.0, 5.0, 1.0, 0.0]), callback=interrupt, disable_pbar=True, seed=0)
    assert hooks() == 0 and set(vars(guider)) & {"_batch", "_masks"} == set()
    assert torch.equal(sample(plain(model, tiny_cond(model), [], 1.0)), base)


def test_other_patches_see_ordinary_rows():
    model = tiny_unet()
    seen = set()

    def patch(n, context, value, options):
        seen.add(tuple(options["cond_or_uncond"]))
        return n, context, value

    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    entries = [StyleEntry(lora=random_lora(model, 1), mask=masks(1)[0])]
    sample(multi_style_guider(patched, tiny_cond(model), tiny_cond(model, seed=2), 3.0, entries))
    assert all(set(rows) == {0, 1} for rows in seen) and seen


def featured(model, size=(16, 8), steps=4, batch=1, seed=11, layers="6-11", memory="recompute"):
    from pastiche.nodes.host.features.capture import capture
    from pastiche.nodes.host.trajectories.inversion import invert

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))
    _, trajectory = invert(model, {"samples": latent}, sigmas, tiny_cond(model), "next")
    return capture(model, trajectory, "self_attention", layers, memory, "full")


def test_features_are_a_style():
    """One style of features everywhere is Style Injection without query preservation; beside a LoRA it keeps to its rows."""
    from pastiche.nodes.host.injections.style import inject_style

    model = tiny_unet()
    bank, positive, negative = featured(model), tiny_cond(model), tiny_cond(model, seed=5)
    alone = sample(plain(inject_style(model, bank, None, 0.0, 1.5, 1.0, "6-11", 0.0, 1.0, None), positive, negative, 3.0))
    base = sample(plain(model, positive, negative, 3.0))
    entry = StyleEntry(features=bank, layers="6-11")
    ours = sample(multi_style_guider(model, positive, negative, 3.0, [entry]))
    assert (alone - base).abs().max() > 1e-2 * base.abs().max()
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()
    lora, both = random_lora(model, 1), torch.stack([torch.zeros(64, 32), torch.ones(64, 32)])
    mixed = [StyleEntry(lora=lora, mask=1 - both), StyleEntry(features=bank, layers="6-11", mask=both)]
    ours = sample(multi_style_guider(model, positive, negative, 3.0, mixed))
    styled = sample(plain(merged(model, lora), positive, negative, 3.0))
    torch.testing.assert_close(ours[0], styled[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours[1], alone[1], rtol=1e-4, atol=1e-3)
    weak = StyleEntry(features=bank, layers="6-11", strength=0.0)
    assert torch.equal(sample(multi_style_guider(model, positive, negative, 3.0, [weak])), base)


def test_features_that_do_not_fit():
    model = tiny_unet()
    with pytest.raises(ValueError, match="lack self_attention of output 5"):
        MultiStyleGuider(model, [StyleEntry(features=featured(model), layers="5-11")])
    with pytest.raises(ValueError, match="features of style 1 were made with another model"):
        MultiStyleGuider(tiny_unet(seed=2), [StyleEntry(features=featured(model), layers="6-11")])
    wide = multi_style_guider(model, tiny_cond(model), [], 1.0, [StyleEntry(features=featured(model, (8, 8)), layers="6-11")])
    with pytest.raises(ValueError, match="latent is 8x8, the sampled one 8x16"):
        sample(wide)


def test_masks_outside_0_to_1_are_cut_off():
    model = tiny_unet()
    lora, positive = random_lora(model, 1), tiny_cond(model)
    mask = torch.linspace(-1, 2, 64).view(1, 64, 1).expand(1, 64, 32).contiguous()
    results = [sample(multi_style_guider(model, positive, [], 1.0, [StyleEntry(lora=lora, mask=part)]), 1) for part in (mask, resized(mask))]
    assert torch.equal(*results)


def resized(mask):
    """The mask on the latent's grid, cut off by hand."""
    from pastiche.nodes.algorithms.masks import resize_mask

    return resize_mask(mask, *SIZE[2:]).clamp(0, 1)


def test_without_guidance_the_negative_is_zeros_as_cores_is():
    model = tiny_unet()
    seen = []

    def look(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(look)
    positive, negative = tiny_cond(model), tiny_cond(model, seed=5)
    sample(multi_style_guider(patched, positive, negative, 1.0, [StyleEntry(lora=random_lora(model, 1))]), 1)
    sample(plain(patched, positive, negative, 1.0), 1)
    assert len(seen) == 2 and not seen[0].any() and torch.equal(seen[0], seen[1])


def test_each_sample_takes_the_features_of_its_own_image():
    from pastiche.nodes.host.injections.style import inject_style

    model = tiny_unet()
    bank, positive, negative = featured(model, batch=2), tiny_cond(model), tiny_cond(model, seed=5)
    alone = sample(plain(inject_style(model, bank, None, 0.0, 1.5, 1.0, "6-11", 0.0, 1.0, None), positive, negative, 3.0))
    lora = StyleEntry(lora=random_lora(model, 1), mask=torch.zeros(1, 8, 8))
    for entries in ([StyleEntry(features=bank, layers="6-11")], [lora, StyleEntry(features=bank, layers="6-11")]):
        ours = sample(multi_style_guider(model, positive, negative, 3.0, entries))
        assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()
    single = sample(plain(inject_style(model, featured(model), None, 0.0, 1.5, 1.0, "6-11", 0.0, 1.0, None), positive, negative, 3.0))
    assert (single[1] - alone[1]).abs().max() > 1e-2 * alone.abs().max()  # image 0 would give another second sample


def test_content_features_and_thresholds_of_each_style():
    """DiffStyler's code: each style's features from its own LoRA'd pass, styles and base for other shares of the steps."""
    from pastiche.nodes.host.features.capture import capture
    from pastiche.nodes.host.injections.content import inject_features
    from pastiche.nodes.host.trajectories.inversion import invert

    model, steps = tiny_unet(), 4
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.randn(1, 4, *SIZE[2:], generator=torch.Generator().manual_seed(11))
    _, trajectory = invert(model, {"samples": latent}, sigmas, tiny_cond(model), "next")
    own, positive, negative = masks(2), tiny_cond(model, seed=3), tiny_cond(model, seed=9)
    own = [torch.nn.functional.interpolate(mask[None] / 2, SIZE[2:])[0] for mask in own]  # on the latent's grid, with a rest

    def injected(model, feature_steps, attention_steps):
        bank = capture(model, trajectory, "residual, self_attention_qk, cross_attention", "6, 8", "ram", "full")
        return inject_features(model, bank, feature_steps, attention_steps, "6", "6, 8", "8", "blend")

    lorad = [merged(model, random_lora(model, seed)) for seed in (1, 2)]
    styles, base = [injected(lorad[0], 0.25, 0.5), lorad[1]], injected(model, 0.75, 1.0)  # the second has the base's features
    entries = [StyleEntry(model=styled, mask=mask) for styled, mask in zip(styles, own)]
    ours = sample(multi_style_guider(base, positive, negative, 3.0, entries), steps)
    bank = capture(model, trajectory, "residual, self_attention_qk, cross_attention", "6, 8", "ram", "full")
    second = inject_features(lorad[1], bank, 0.75, 1.0, "6", "6, 8", "8", "blend")
    weights = [*(mask.unsqueeze(0) for mask in own), 1 - sum(own).unsqueeze(0)]
    parts = [(m, positive, negative, 3.0, weight) for m, weight in zip((styles[0], second, base), weights)]
    expected = sample(Loop(model, parts), steps)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    shared = [StyleEntry(model=styled, mask=mask) for styled, mask in zip(lorad, own)]
    for other in (shared, [StyleEntry(model=injected(lorad[0], 0.75, 1.0), mask=own[0]), shared[1]]):  # neither bank nor shares are lost
        assert (sample(multi_style_guider(base, positive, negative, 3.0, other), steps) - expected).abs().max() > 2e-3 * expected.abs().max()
