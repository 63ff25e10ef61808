"""Loading the pack replaces nothing in ComfyUI: no function, class member or module attribute."""

import os
import subprocess
import sys

CODE = """
import asyncio, os, sys, types
sys.path[:0] = [{tests!r}]
import conftest
import comfy.sd, comfy.samplers, comfy.lora, comfy.model_patcher, comfy.utils, comfy.sample, latent_preview
import comfy.ldm.modules.diffusionmodules.openaimodel, comfy.ldm.modules.attention, comfy_api.latest, folder_paths, nodes

def members(owner):
    for name, value in list(vars(owner).items()):
        if isinstance(value, (types.FunctionType, type, staticmethod, classmethod, property)):
            yield name, value

def snapshot(keep=[]):
    found = {{}}
    for module_name in [m for m in sys.modules if m.split(".")[0] in ("comfy", "comfy_api", "latent_preview", "folder_paths", "nodes", "torch")]:
        module = sys.modules[module_name]
        for name, value in members(module) if isinstance(module, types.ModuleType) else ():
            found[module_name, name] = value
            if isinstance(value, type) and value.__module__ == module_name and module_name.split(".")[0] != "torch":
                for inner, method in members(value):
                    found[module_name, name + "." + inner] = method
    return found

folder_paths.add_model_folder_path("loras", os.path.join(folder_paths.get_output_directory(), "loras"))  # core's main.py does it
before = snapshot()
folders = {{key: (list(paths), set(kinds)) for key, (paths, kinds) in folder_paths.folder_names_and_paths.items()}}

from pastiche.nodes.extension import comfy_entrypoint
async def load():
    extension = await comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
asyncio.run(load())

after = snapshot()
print("changed:", [key for key, value in before.items() if after.get(key) is not value])
print("folders:", [key for key, value in folders.items() if (list(folder_paths.folder_names_and_paths[key][0]), set(folder_paths.folder_names_and_paths[key][1])) != value])
print("seen:", len(before) > 3000)
"""


def test_importing_and_registering_leaves_comfyui_as_it_was(repository, comfyui):
    code = CODE.format(tests=str(repository / "tests"))
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-3:] == ["changed: []", "folders: []", "seen: True"]
