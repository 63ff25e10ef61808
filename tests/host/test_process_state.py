"""The pack changes nothing of the process that others share: environment, warnings, logging, torch's flags, hooks, handlers.

In a process of its own: packages that a node imports may change such things on import, which happens once.
"""

import json
import os
import subprocess
import sys

CODE = """
import asyncio, gc, json, locale, logging, os, random, signal, sys, threading, types, warnings
sys.path[:0] = [{tests!r}]
import conftest
import numpy, PIL.Image, torch
import comfy.sd, comfy.samplers, comfy.utils, comfy.model_management, folder_paths, nodes, latent_preview, comfy_api.latest
import comfy_extras.nodes_custom_sampler
from support.models import tiny_cond, tiny_unet

model = tiny_unet()
torch.zeros(2).numpy()

def state():
    backends = torch.backends
    return {{
        "environment": dict(os.environ), "path": list(sys.path), "directory": os.getcwd(), "locale": locale.setlocale(locale.LC_ALL),
        "warnings": [str(entry) for entry in warnings.filters], "showwarning": repr(warnings.showwarning),
        "logging": [logging.root.level, list(map(repr, logging.root.handlers)), logging.root.manager.disable, logging.lastResort.level, logging.raiseExceptions],
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook)],
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "limits": [sys.getrecursionlimit(), sys.get_int_max_str_digits(), gc.isenabled(), gc.get_threshold(), sys.getswitchinterval()],
        "random": str(random.getstate())[:200], "numpy": [str(numpy.get_printoptions()), numpy.geterr(), str(numpy.random.get_state()[1][:5])],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "torch": [
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.utils.deterministic.fill_uninitialized_memory,
            torch.is_anomaly_enabled(), torch.get_default_device(), torch._C._get_cudnn_allow_tf32(),
        ],
        "backends": [
            backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cuda.matmul.allow_tf32, backends.mkldnn.enabled,
            backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.math_sdp_enabled(),
        ],
        "functions": [repr(function) for function in (torch.load, torch.save, torch.Tensor.__repr__, print, open, torch.nn.functional.scaled_dot_product_attention)],
        "allowed": sorted(map(str, torch.serialization.get_safe_globals())), "printing": str(vars(torch._tensor_str.PRINT_OPTS)),
    }}

changed, last = {{}}, state()

def compare(what):
    global last
    now = state()
    for key in now:
        if str(now[key]) != str(last[key]):
            changed[f"{{what}}: {{key}}"] = [str(last[key])[:600], str(now[key])[:600]]
    last = now

from pastiche.nodes.extension import comfy_entrypoint
async def load():
    extension = await comfy_entrypoint()
    await extension.on_load()
    return {{node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}}
NODES = asyncio.run(load())
compare("loading the pack")

folder_paths.add_model_folder_path("diffusers", {assets!r})
class Hidden:
    unique_id = "1"
    prompt = extra_pnginfo = None
def run(name, **inputs):
    result = type(name, (NODES["Pastiche" + name],), {{"hidden": Hidden}}).execute(**inputs).result
    compare(name)
    return result
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
compare("core")
_, trajectory, *_ = run("DDIMInversion", model=model, latent={{"samples": torch.ones(1, 4, 8, 8)}}, sigmas=sigmas, positive=tiny_cond(model))
run("CaptureFeatures", model=model, trajectory=trajectory, memory="disk")
run("LoadUnconditional", folder="ddpm_blobs")
run("LoadMini", kind="photo")
training = dict(model=model, positive=tiny_cond(model), latents={{"samples": torch.ones(1, 4, 8, 8)}}, steps=2, rank=2, precision="bf16")
run("TrainStyleLoRA", **training)
comfy.model_management.interrupt_current_processing()
try:
    run("TrainStyleLoRA", **training)
except comfy.model_management.InterruptProcessingException:
    compare("Cancel")
comfy.model_management.interrupt_current_processing(False)
if {segmenter}:
    (fastsam,) = run("LoadFastSAM", model_name="pastiche mini (demo)")
    run("FastSAMPrompt", fastsam=fastsam, image=torch.rand(1, 64, 64, 3))
import json
print(json.dumps(changed, indent=1))
"""


def test_no_node_changes_what_the_process_shares(repository, comfyui):
    import importlib.util

    code = CODE.format(
        tests=str(repository / "tests"), assets=str(repository / "tests" / "assets"), segmenter=importlib.util.find_spec("ultralytics") is not None
    )
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout[done.stdout.rindex("{\n") if "{\n" in done.stdout else done.stdout.rindex("{}"):]) == {}
