"""API-format graphs as data: find nodes, set inputs, provide the files they name, compare, lay out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from .environment import ROOT

SAMPLES = ROOT / "assets" / "samples"
# file inputs by (class_type, input), and the models folder of those that are models
_MODELS = {("CheckpointLoaderSimple", "ckpt_name"): "checkpoints", ("LoraLoaderModelOnly", "lora_name"): "loras",
           ("LoraLoader", "lora_name"): "loras", ("LoraModelLoader", "lora_name"): "loras", ("VAELoader", "vae_name"): "vae",
           ("UNETLoader", "unet_name"): "diffusion_models", ("CLIPLoader", "clip_name"): "text_encoders",
           ("DualCLIPLoader", "clip_name1"): "text_encoders", ("DualCLIPLoader", "clip_name2"): "text_encoders",
           ("ControlNetLoader", "control_net_name"): "controlnet", ("PasticheLoadFastSAM", "model_name"): "fastsam",
           ("PasticheLoadFeatures", "file"): "pastiche_features"}


def find(prompt: dict[str, Any], class_type: str, title: str | None = None) -> list[str]:
    """Ids of the nodes of a class, and of a title when one is given."""
    return [
        key for key, node in prompt.items()
        if node["class_type"] == class_type and title in (None, node.get("_meta", {}).get("title"))
    ]


def set_input(prompt: dict[str, Any], class_type: str, name: str, value: Any, title: str | None = None) -> int:
    """Sets an input, where it is a plain value, on every matching node; returns how many there were."""
    keys = [key for key in find(prompt, class_type, title) if not isinstance(prompt[key]["inputs"].get(name), list)]
    for key in keys:
        prompt[key]["inputs"][name] = value
    return len(keys)


def sample(kind: str) -> Path:
    """The first sample image of "content" or "style" that comes with the repository."""
    found = sorted(path for path in SAMPLES.glob(f"{kind}_*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not found:
        raise FileNotFoundError(f"{SAMPLES} has no {kind}_* image")
    return found[0]


def provide_files(prompt: dict[str, Any], base: Path) -> None:
    """Puts into a base directory what the graph's loaders name, so that the front end does not mark it as missing.

    The files are empty, good for showing the graph and not for running it.
    """
    for node in prompt.values():
        for name, value in node["inputs"].items():
            folder = _MODELS.get((node["class_type"], name))
            if folder and isinstance(value, str):
                target = base / "models" / folder / value
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            elif node["class_type"] == "LoadVideo" and name == "file":
                (base / "input").mkdir(parents=True, exist_ok=True)
                (base / "input" / value).write_bytes(b"\0")  # for an empty one the front end shows an error
            elif node["class_type"] == "PasticheLoadUnconditional" and name == "folder":
                target = base / "models" / "diffusers" / value / "config.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.write_text('{"_class_name": "UNet2DModel"}')


def flat(prompt: dict[str, Any]) -> dict[str, Any]:
    """The graph with the ids that nodes have inside subgraphs: "31:12" is 12. Raises ValueError where two would be one."""
    found = {}
    for key, node in prompt.items():
        inputs = {n: [v[0].rsplit(":", 1)[-1], v[1]] if isinstance(v, list) and v and isinstance(v[0], str) else v for n, v in node["inputs"].items()}
        short = key.rsplit(":", 1)[-1]
        if short in found:
            raise ValueError(f"two nodes are {short}")
        found[short] = {**node, "inputs": inputs}
    return found


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """What a graph lacks or has otherwise than `expected`; inputs that `expected` leaves out may have any value."""
    found = []
    for key, node in expected.items():
        if key not in actual:
            found.append(f"node {key} ({node['class_type']}) is gone")
            continue
        if actual[key]["class_type"] != node["class_type"]:
            found.append(f"node {key} is {actual[key]['class_type']}, not {node['class_type']}")
        for name, value in node["inputs"].items():
            got = actual[key]["inputs"].get(name)
            if got != value and not (isinstance(value, list) and isinstance(got, list) and [str(v) for v in got] == [str(v) for v in value]):
                found.append(f"{node['class_type']} {key}: {name} is {got!r}, not {value!r}")
    return found + [f"node {key} ({node['class_type']}) is new" for key, node in actual.items() if key not in expected]


def layout(
    prompt: dict[str, Any], sizes: dict[str, list[float]], gap: tuple[float, float] = (70, 70)
) -> dict[str, list[float]]:
    """Top left corners for the nodes: columns along the data flow, few crossings, no overlap.

    sizes: (width, height) by id, titles not counted. A column is one more than that of the node's last source;
    nodes without inputs stand next to their first user.
    """
    sources = {
        key: [str(value[0]) for value in node["inputs"].values() if isinstance(value, list) and str(value[0]) in prompt]
        for key, node in prompt.items()
    }
    users: dict[str, list[str]] = {key: [] for key in prompt}
    for key, found in sources.items():
        for source in found:
            users[source].append(key)

    column: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in column:
            column[key] = 1 + max((depth(source) for source in sources[key]), default=-1)
        return column[key]

    for key in prompt:
        depth(key)
    # late sources move next to their first user; latest columns first, so that chains follow
    for key in sorted(prompt, key=lambda k: -column[k]):
        if users[key] and not sources[key]:
            column[key] = max(column[key], min(column[user] for user in users[key]) - 1)

    columns = [[key for key in prompt if column[key] == i] for i in range(max(column.values()) + 1)]
    rank = {key: float(i) for found in columns for i, key in enumerate(found)}
    for backward, _ in itertools.product((False, True), range(6)):
        for found in reversed(columns) if backward else columns:
            near = users if backward else sources
            found.sort(key=lambda key: sum(rank[n] for n in near[key]) / len(near[key]) if near[key] else rank[key])
            rank.update((key, float(i)) for i, key in enumerate(found))
    # of the two mirror images, the one that keeps twins (content and style branch) in the order written
    order = {key: i for i, key in enumerate(prompt)}
    pairs = [
        (a, b) for found in columns for a, b in itertools.combinations(found, 2)
        if prompt[a]["class_type"] == prompt[b]["class_type"]
    ]
    if sum(order[a] < order[b] for a, b in pairs) * 2 < len(pairs):
        columns = [found[::-1] for found in columns]

    places, x = {}, 0.0
    for found in columns:
        heights = [sizes[key][1] for key in found]
        y = -(sum(heights) + gap[1] * (len(found) - 1)) / 2
        for key, height in zip(found, heights):
            places[key] = [round(x), round(y)]
            y += height + gap[1]
        x += max((sizes[key][0] for key in found), default=0) + gap[0]
    return places
