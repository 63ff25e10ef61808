"""Inversions and features found again: the same bits without an evaluation, and never another computation's."""

import gc
import logging
import weakref
from dataclasses import replace

import comfy.lora
import comfy.model_management as management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.stores import MemoryStore
from pastiche.nodes.host.networks.content import digest
from pastiche.nodes.host.trajectories import found_again
from pastiche.nodes.host.trajectories.found_again import RESULTS, FoundAgain
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.inversion import DDIMInversion
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule
from support.styles import random_lora

CPU = torch.device("cpu")
STEPS = 2


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv(found_again.SETTING, "100")
    monkeypatch.setattr(found_again, "HEADROOM", 0)
    RESULTS.clear()
    yield
    RESULTS.clear()


@pytest.fixture
def evaluations(monkeypatch):
    """How often a network was evaluated; counted in the class, as nothing may hang on the network itself."""
    count, forward = [], UNetModel.forward

    def counting(self, *args, **kwargs):
        count.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", counting)
    return count


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


def settings_of(model, **changes):
    """DDIM Inversion's inputs, every tensor made anew as nodes that ran again do."""
    return {
        "model": model, "latent": {"samples": random_latent()}, "sigmas": schedule(model, STEPS), "positive": tiny_cond(model),
        "scheme": "next", "layers": "6-7", "precision": "full",
    } | changes


def run(settings):
    return DDIMInversion.execute(**settings).result


def bits(outputs):
    """All that an inversion gives, as tensors."""
    noise, trajectory, start, bank = outputs[:4]
    stored = [] if bank.store is None else [bank.store.read(key, step, CPU) for key in bank.keys for step in range(1, STEPS + 1)]
    return [noise["samples"], trajectory.latents, trajectory.sigmas, start.latent, *stored]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- found again

@pytest.mark.device("default", "partial")
@pytest.mark.parametrize("scheme, where", [("predicted", "recompute"), ("fixed_point", "ram"), ("current", "vram"), ("next", "disk")])
def test_the_same_inversion_is_not_computed_twice_and_gives_the_same_bits(evaluations, scheme, where, caplog):
    model = tiny_unet()
    with caplog.at_level(logging.INFO):
        first = run(settings_of(model, scheme=scheme, memory=where))
        computed = len(evaluations)
        expected = [tensor.clone() for tensor in bits(first)]
        assert computed >= STEPS and "found again" not in caplog.text
        del first
        second = run(settings_of(model, scheme=scheme, memory=where))
    assert len(evaluations) == computed and caplog.text.count("found again: the inversion of 1 latent of 8x8 in 2 steps") == 1
    assert same(bits(second), expected)
    assert second[3].memory == where and second[3].model is model and second[1].scheme == scheme


@pytest.mark.device("default")
@pytest.mark.parametrize("where", ["ram", "vram", "disk"])
def test_captured_features_are_found_again(evaluations, where, caplog):
    model = tiny_unet()
    trajectory = run(settings_of(model))[1]

    def captured():
        again = replace(trajectory, latents=trajectory.latents.clone(), conditioning=tiny_cond(model))
        bank = capture(model, again, "self_attention, h_space", "6", where, "full")
        assert bank.trajectory is again and bank.model is model
        return [bank.store.read(key, step, CPU) for key in bank.keys for step in range(1, STEPS + 1)]

    first = [tensor.clone() for tensor in captured()]
    computed = len(evaluations)
    with caplog.at_level(logging.INFO):
        assert same(captured(), first)
    assert len(evaluations) == computed == 2 * STEPS and f"found again: 2 features of each of 2 steps ({where})" in caplog.text
    capture(model, trajectory, "self_attention", "6", where, "full")
    capture(model, replace(trajectory, latents=trajectory.latents * 1.5), "self_attention, h_space", "6", where, "full")
    assert len(evaluations) == 4 * STEPS


def test_two_pictures_of_one_node_are_found_again_together(model, evaluations):
    pair = {"style": {"samples": random_latent(seed=1)}, "memory": "ram"}
    first = run(settings_of(model, **pair))
    computed = len(evaluations)
    second = run(settings_of(model, **pair))
    assert len(evaluations) == computed
    assert same(bits(second) + bits(second[4:]), bits(first) + bits(first[4:]))
    run(settings_of(model, **pair | {"style": {"samples": random_latent(seed=2)}}))
    assert len(evaluations) == 2 * computed


def test_the_progress_bar_jumps_to_its_end(model, monkeypatch):
    told = []
    run(settings_of(model))
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: told.append((value, total)))
    run(settings_of(model))
    assert told == [(STEPS, STEPS)]


def test_what_the_iteration_told_is_told_again(model, caplog):
    """On a random network the fixed point diverges: a picture that is found again has the same fault."""
    texts = []
    for _ in range(2):
        caplog.clear()
        run(settings_of(model, scheme="fixed_point", iterations=10))
        texts.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert texts[0] == texts[1] and "diverged" in texts[0][0]


def test_nodes_of_the_model_that_ran_again_are_the_same(model, evaluations):
    """LoRAs by their tensors, other nodes' patches by their code and settings."""
    def upstream():
        patched = model.clone()
        patched.add_patches(comfy.lora.load_lora(random_lora(model, 3), comfy.lora.model_lora_keys_unet(model.model, {})), 0.5)
        patched = ModelSamplingDiscrete().patch(patched, "v_prediction", False)[0]
        return scaled(patched, 0.5, "attn1")

    expected = bits(run(settings_of(upstream())))
    computed = len(evaluations)
    assert same(bits(run(settings_of(upstream()))), expected) and len(evaluations) == computed > 0


# --- not found: each ingredient

def scaled(model, factor, kind=None):
    """A clone with a patch of another node, whose closure holds a number."""
    changed = model.clone()
    if kind == "attn1":
        changed.set_model_attn1_patch(lambda q, k, v, options: (q * factor, k, v))
    elif kind == "wrapper":
        changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lambda executor, *args, **kwargs: executor(*args, **kwargs) * factor)
    else:
        changed.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * factor)
    return changed


def with_lora(model, seed=3, strength=0.5, nudge=0.0):
    lora = random_lora(model, seed)
    lora[next(iter(lora))].view(-1)[77] += nudge
    changed = model.clone()
    changed.add_patches(comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model.model, {})), strength)
    return changed


def nudged(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[5] = torch.nextafter(tensor.view(-1)[5], torch.tensor(100.0))
    return tensor


def with_options(model, **options):
    changed = model.clone()
    changed.model_options["transformer_options"].update(options)
    return changed


def computing_in(model, dtype):
    changed = model.clone()
    changed.set_model_compute_dtype(dtype)
    return changed


OTHER = {
    "a value of the latent": lambda m: {"latent": {"samples": nudged(random_latent())}},
    "the batch": lambda m: {"latent": {"samples": random_latent().repeat(2, 1, 1, 1)}},
    "the latent's type": lambda m: {"latent": {"samples": random_latent().double()}},
    "the latent's shape": lambda m: {"latent": {"samples": random_latent().reshape(1, 4, 4, 16).contiguous()}},
    "the schedule": lambda m: {"sigmas": schedule(m, STEPS, "karras")},
    "the number of steps": lambda m: {"sigmas": schedule(m, STEPS + 1)},
    "a value of the conditioning": lambda m: {"positive": [[nudged(tiny_cond(m)[0][0]), {}]]},
    "an extra of the conditioning": lambda m: {"positive": [[tiny_cond(m)[0][0], {"strength": 0.5}]]},
    "no conditioning": lambda m: {"positive": None},
    "scheme": lambda m: {"scheme": "predicted"},
    "iterations": lambda m: {"scheme": "fixed_point", "iterations": 2},
    "tolerance": lambda m: {"scheme": "fixed_point", "iterations": 3, "tolerance": 0.5},
    "substeps": lambda m: {"substeps": 2},
    "clean_level": lambda m: {"clean_level": "t = 0"},
    "a LoRA": lambda m: {"model": with_lora(m)},
    "its strength": lambda m: {"model": with_lora(m, strength=0.25)},
    "a value of it": lambda m: {"model": with_lora(m, nudge=0.01)},
    "a wrapper of the model": lambda m: {"model": scaled(m, 0.5)},
    "its number": lambda m: {"model": scaled(m, 0.25)},
    "an attention patch": lambda m: {"model": scaled(m, 0.5, "attn1")},
    "its number there": lambda m: {"model": scaled(m, 0.25, "attn1")},
    "a wrapper by its key": lambda m: {"model": scaled(m, 0.5, "wrapper")},
    "transformer options": lambda m: {"model": with_options(m, scale=2.0)},
    "the sampling of the model": lambda m: {"model": ModelSamplingDiscrete().patch(m, "v_prediction", False)[0]},
    "another sampling": lambda m: {"model": ModelSamplingDiscrete().patch(m, "x0", False)[0]},
    "the compute type": lambda m: {"model": computing_in(m, torch.bfloat16)},
    "features": lambda m: {"memory": "ram"},
    "their layers": lambda m: {"memory": "ram", "layers": "8"},
    "their stream": lambda m: {"memory": "ram", "streams": "h_space"},
    "their precision": lambda m: {"memory": "ram", "precision": "half"},
    "where they are": lambda m: {"memory": "disk"},
}


@pytest.fixture(scope="module")
def all_found(model):
    """Keys of every other computation of the table, as they are asked for."""
    return {}


@pytest.mark.parametrize("what", OTHER)
def test_each_ingredient_is_another_computation(model, evaluations, all_found, what, monkeypatch):
    asked = []
    find = FoundAgain.find
    monkeypatch.setattr(FoundAgain, "find", lambda self, key: asked.append(key) or find(self, key))
    run(settings_of(model))
    computed, plain_key = len(evaluations), asked[0]
    asked.clear()
    run(settings_of(model) | OTHER[what](model))
    assert len(evaluations) > computed, "found what was computed from something else"
    if not what.startswith(("features", "their", "where")):
        assert asked[0] is not None and asked[0] != plain_key and asked[0] not in all_found.values()
        all_found[what] = asked[0]
    computed = len(evaluations)
    run(settings_of(model))  # a plain model after a patched one, whose weights ComfyUI may have changed in place
    assert len(evaluations) == computed


def test_networks_changed_in_place_are_others(evaluations):
    model = tiny_unet()
    network = model.model.diffusion_model

    def computed():
        before = len(evaluations)
        run(settings_of(model))
        return len(evaluations) - before

    assert (computed(), computed()) == (STEPS, 0)
    block = network.middle_block[0]
    hook = block.register_forward_hook(lambda module, args, output: output * 0.5)
    assert (computed(), computed()) == (STEPS, 0)
    hook.remove()
    assert computed() == 0
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.25
    assert computed() == STEPS
    del block.forward
    with torch.no_grad():
        network.out[2].weight.mul_(1.5)
    assert computed() == STEPS


def test_two_models_of_the_same_weights_are_two(evaluations):
    """Which weights are the same cannot be told without reading all of them: the other model is inverted for itself."""
    one, two = tiny_unet(seed=4), tiny_unet(seed=4)
    first, second = (bits(run(settings_of(model))) for model in (one, two))
    assert len(evaluations) == 2 * STEPS and same(first, second)
    run(settings_of(one))
    run(settings_of(two))
    assert len(evaluations) == 2 * STEPS
    assert not same(bits(run(settings_of(tiny_unet(seed=5)))), first)


def test_switches_of_the_process_and_the_device_are_told(model, monkeypatch):
    plain = digest(model)
    assert plain is not None and digest(model) == plain and digest(model.clone()) == plain
    elsewhere = model.clone()
    elsewhere.load_device = torch.device("meta")
    assert digest(elsewhere) != plain
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    assert digest(model) != plain


def test_what_cannot_be_told_is_never_found(model, evaluations, monkeypatch):
    """An object with hidden state, a sparse tensor, more objects than are looked through."""
    class Slots:
        __slots__ = ("value",)

    for unknown in (iter([]), Slots(), torch.eye(3).to_sparse(), {object()}):
        assert digest(unknown) is None
    many = [[] for _ in range(500)]
    assert digest(many) is not None
    with monkeypatch.context() as patch:
        patch.setattr("pastiche.nodes.host.networks.content.MOST_OBJECTS", 500)
        assert digest(many) is None
    assert digest({"a": 1}) != digest({"a": True}) != digest(["a", 1]) != digest(("a", 1))
    for _ in range(2):
        run(settings_of(with_options(model, other=Slots())))
    assert len(evaluations) == 2 * STEPS and not len(RESULTS)


FACTOR, TABLE = 1.0, {"scale": 1.0}


@pytest.mark.parametrize("name, value", [("FACTOR", 0.5), ("TABLE", {"scale": 2.0})])
def test_a_modules_values_belong_to_its_functions(monkeypatch, name, value):
    def patch(x):
        return [x * FACTOR * y for y in TABLE.values()]

    plain = digest(patch)
    assert plain is not None and digest(patch) == plain
    monkeypatch.setitem(globals(), name, value)
    assert digest(patch) not in (None, plain)


def test_state_of_a_patch_that_changes_is_another_patch(model, evaluations):
    class Patch:
        factor = 1.0

        def __call__(self, apply, args):
            return apply(args["input"], args["timestep"], **args["c"]) * self.factor

    patched, patch = model.clone(), Patch()
    patched.set_model_unet_function_wrapper(patch)
    run(settings_of(patched))
    patch.factor = 0.5
    run(settings_of(patched))
    assert len(evaluations) == 2 * STEPS


@pytest.mark.parametrize("node, setting", [
    (neighbours.pag, 2.0), (neighbours.sag, 0.5), (neighbours.nag, 2.0), (neighbours.easycache, 1.0), (neighbours.lazycache, 1.0),
    (neighbours.tome, 0.25), (neighbours.deep_shrink, 0.5),
], ids=lambda part: getattr(part, "__name__", ""))
def test_nodes_of_core_by_their_settings(model, node, setting):
    found = digest(node(model))
    assert found is not None and digest(node(model)) == found != digest(model)
    assert digest(node(model, setting)) not in (None, found)


def test_a_controlnet_in_the_conditioning(model, evaluations):
    """By its network, picture and strength; the run that used it leaves it as it was."""
    positive, _ = neighbours.controlled(tiny_cond(model), tiny_cond(model), (8, 8))
    control = positive[0][1]["control"]
    plain, computed = digest(positive), []
    assert plain is not None
    changes = [
        ("strength", 0.25), ("cond_hint_original", control.cond_hint_original + 0.1), ("timestep_percent_range", (0.0, 0.5)),
        ("control_model", type(control.control_model)), ("previous_controlnet", control.copy()),
    ]
    for name, value in changes:
        kept = getattr(control, name)
        setattr(control, name, value)
        assert digest(positive) not in (None, plain), name
        setattr(control, name, kept)
    for _ in range(3):
        run(settings_of(model, positive=positive))
        computed.append(len(evaluations))
    assert computed[0] == computed[1] == computed[2] > 0 and digest(positive) == plain


# --- what is given out is one's own

def test_nobody_can_spoil_what_is_found(model):
    settings = settings_of(model, memory="ram")
    first = run(settings)
    expected = [tensor.clone() for tensor in bits(first)]
    for outputs in (first, run(settings)):
        for tensor in bits(outputs):
            tensor.fill_(7.0)
        assert same(bits(run(settings)), expected)
    with pytest.raises(ValueError, match="kept for later and cannot be written"):
        first[3].store.write(first[3].keys[0], 1, torch.zeros(1))


# --- bound, off, interrupted

class Owner(torch.nn.Module):
    pass


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv(found_again.SETTING, "0.001")  # 1000 bytes
    return FoundAgain()


def test_the_least_recently_used_goes_first_and_the_bound_holds(small):
    owner = Owner()
    for name in "abc":
        assert small.keep(name, owner, name, 300)
    assert small.find("a") == "a"  # now the youngest
    small.keep("d", owner, "d", 300)
    assert small.nbytes == 900 and [small.find(name) for name in "abcd"] == ["a", None, "c", "d"]
    assert not small.keep("e", owner, "e", 1001) and small.nbytes == 900
    small.keep("a", owner, "A", 10)  # in its own place
    assert small.find("a") == "A" and small.nbytes == 610


def test_too_large_is_told_with_the_setting(small, caplog):
    with caplog.at_level(logging.INFO):
        small.keep("a", Owner(), "a", 5_000_000)
    assert "5 MB are more than is kept" in caplog.text and found_again.SETTING in caplog.text


def test_memory_that_others_need_is_given_back(small, monkeypatch):
    owner = Owner()
    for name in "abc":
        small.keep(name, owner, name, 300)
    free = {"now": 10**12}
    monkeypatch.setattr(found_again.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free["now"]}))
    monkeypatch.setattr(found_again, "HEADROOM", 1000)
    assert small.find("c") == "c" and small.nbytes == 900
    free["now"] = 500  # 500 too little: two of three go
    assert small.find("c") == "c" and small.nbytes == 300
    assert not small.keep("d", owner, "d", 900)


@pytest.mark.parametrize("setting, limit", [("0", 0), ("-5", 0), ("12.5", 12_500_000), ("", 0), ("nan", None), ("much", None)])
def test_the_setting(monkeypatch, setting, limit):
    """Nothing set: off where ComfyUI itself runs with --cache-none, as these tests do."""
    monkeypatch.setenv(found_again.SETTING, setting)
    default = found_again.DEFAULT_MB * 1_000_000
    assert FoundAgain().limit == (default if limit is None else limit)
    monkeypatch.delenv(found_again.SETTING)
    monkeypatch.setattr(found_again.args, "cache_none", False)
    assert FoundAgain().limit == default


def test_off_keeps_nothing_and_gives_back_what_there_was(model, evaluations, monkeypatch):
    run(settings_of(model))
    assert len(RESULTS)
    monkeypatch.setenv(found_again.SETTING, "0")
    run(settings_of(model))
    assert len(evaluations) == 2 * STEPS
    RESULTS.find("anything")
    assert not len(RESULTS)


@pytest.mark.parametrize("where", ["recompute", "ram", "disk"])
def test_an_interrupted_inversion_is_not_kept(model, evaluations, monkeypatch, where):
    def cancel(self, *args, **kwargs):
        management.interrupt_current_processing()
        return forward(self, *args, **kwargs)

    forward = UNetModel.forward
    with monkeypatch.context() as patch:
        patch.setattr(UNetModel, "forward", cancel)
        with pytest.raises(management.InterruptProcessingException):
            run(settings_of(model, memory=where))
    assert not len(RESULTS)
    run(settings_of(model, memory=where))
    assert len(RESULTS) == (1 if where == "recompute" else 2)


def test_a_failed_capture_is_not_kept(model, monkeypatch):
    trajectory = run(settings_of(model))[1]
    RESULTS.clear()
    monkeypatch.setattr(MemoryStore, "write", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        capture(model, trajectory, "h_space", "auto", "ram")
    assert not len(RESULTS)


def test_cancel_stops_what_is_found_too(model):
    run(settings_of(model))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        run(settings_of(model))


# --- a MODEL that goes

def test_no_model_is_kept_alive_and_its_results_go_with_it():
    model = tiny_unet(seed=6)
    outputs = run(settings_of(model, memory="ram"))
    capture(model, outputs[1], "h_space", "auto", "ram")
    patcher, network = weakref.ref(model), weakref.ref(model.model)
    assert len(RESULTS) == 3
    del model, outputs
    management.unload_all_models()
    gc.collect()
    assert patcher() is None and network() is None
    assert not len(RESULTS) and RESULTS.nbytes == 0


def test_a_new_model_never_gets_an_old_ones_results(evaluations):
    """Where a network dies its address is free for the next one."""
    for number in range(2):
        run(settings_of(tiny_unet(seed=7)))
        assert len(evaluations) == (number + 1) * STEPS
        management.unload_all_models()
        gc.collect()


# --- ComfyUI's request to free memory

class Request:
    def __init__(self, path, body, method="POST"):
        self.path, self.method, self._body = path, method, body

    async def json(self):
        return self._body


@pytest.mark.parametrize("path, body, method, kept", [
    ("/free", {"free_memory": True}, "POST", 0), ("/api/free", {"unload_models": True, "free_memory": True}, "POST", 0),
    ("/free", {"unload_models": True}, "POST", 1), ("/free", [], "POST", 1), ("/free", {"free_memory": True}, "GET", 1),
    ("/prompt", {"free_memory": True}, "POST", 1),
])
def test_comfyuis_free_button_empties_it(path, body, method, kept):
    import asyncio

    owner = Owner()
    RESULTS.keep("a", owner, "a", 10)
    asyncio.run(found_again._answered(Request(path, body, method), type("Response", (), {"status": 200})))
    assert len(RESULTS) == kept


def test_a_queued_prompt_gives_back_memory_that_is_short(monkeypatch):
    import asyncio

    owner = Owner()
    RESULTS.keep("a", owner, "a", 10)
    monkeypatch.setattr(found_again.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5}))
    monkeypatch.setattr(found_again, "HEADROOM", 1000)
    asyncio.run(found_again._answered(Request("/api/prompt", {}), type("Response", (), {"status": 200})))
    assert not len(RESULTS)


def test_without_a_server_there_is_nothing_to_listen_to(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "server", None)
    found_again.empty_with_comfyui()


def test_a_plain_call_of_invert_is_found_too(model, evaluations):
    given = model, {"samples": random_latent(), "batch_index": [4]}, schedule(model, STEPS), tiny_cond(model), "next"
    first, second = invert(*given), invert(*given)
    assert len(evaluations) == STEPS and second[0]["batch_index"] == [4]
    assert torch.equal(first[1].latents, second[1].latents) and first[1].latents is not second[1].latents
    assert first[1].fingerprint == second[1].fingerprint
