#!/usr/bin/env python3
"""InjectFusion's table (CelebA-HQ, 5,000 pairs) with the pack's own nodes in a real ComfyUI, beside the paper's row.

    python benchmarks/injectfusion_table.py --model celeba_hq.safetensors --data data --weights weights --device cuda
    python benchmarks/injectfusion_table.py --model tests/assets/ddpm_blobs --data data --weights random --pairs 4 --size 32 --steps 4

--model: a diffusers folder or a file that Load Unconditional DDPM takes. --data has org/ (originals, which give the look)
and cnt/ (contents). Every picture is inverted once; the same command goes on after an interruption (see --work). Results are
called <original>_injected_<content>.png.
FID: results against the originals, Inception of 2015; ID: cosine of ArcFace between result and content; Gram: VGG19, result
against original. The paper does not publish its Gram layers and scaling: compare ways with each other, not with its number.
--weights: see published_metrics.py; what is missing is left out with a line that says so; `random` tries the plumbing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tables import (
    Table, choose_pairs, inversion_graph, load_picture, mean, node, options_parser, pictures_of, random_note, run_table,
    sampling_graph, shown, unconditional_loader, write_table,
)
from host.environment import Host  # isort: skip  (tables makes it importable)

HEAD = "| | pairs | FID | ID | Gram |\n|---|---|---|---|---|"
PAPER = "| InjectFusion, the paper's slerp (CelebA-HQ, 256 px) | 5000 | 32.09 | 0.4390 | 0.0310 |"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_parser(__file__, __doc__, "org/ and cnt/", 256)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gamma", type=float, default=0.6)
    parser.add_argument("--t-edit", type=int, default=400)
    parser.add_argument("--omega", type=float, default=0.3)
    parser.add_argument("--t-boost", type=int, default=200)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    wrong = None if options.model.exists() else f"--model: {options.model} does not exist."
    return run_table(__file__, arguments, options, wrong, make)


def make(host: Host, options: argparse.Namespace) -> int:
    originals, contents = (pictures_of(options.data / name) for name in ("org", "cnt"))
    pairs = choose_pairs(originals, contents, options.pairs)
    table = Table.of(options, "model", "gamma", "t_edit", "omega", "t_boost")
    if not table.complete(name_of(*pair) for pair in pairs):
        draw(table, host, pairs, options)
    note = random_note(options)
    settings = f"gamma {options.gamma}, t_edit {options.t_edit}, omega {options.omega}, t_boost {options.t_boost}"
    title = f"InjectFusion's table, {options.model.stem}{note}"
    return write_table(options, __file__, title, settings, [HEAD, PAPER, measure(table, pairs, options, note)])


def name_of(original: Path, content: Path) -> str:
    return f"{original.stem}_injected_{content.stem}"


def draw(table: Table, host: Host, pairs: list[tuple[Path, Path]], options: argparse.Namespace) -> None:
    table.provide(options.model, "diffusers")  # before the server looks
    with table.server(host, cpu=options.device == "cpu") as server:
        loader = unconditional_loader(options.model.name)

        def inversion(picture: str, prefix: str) -> dict:
            return inversion_graph(loader, picture, options.size, options.steps, "simple", "h_space", "auto", prefix)

        for pair, banks in zip(pairs, table.invert_all(server, ("org", "cnt"), pairs, inversion)):
            table.picture(server, name_of(*pair), pair_graph(loader, *banks, options))


def pair_graph(loader, original: str, content: str, options: argparse.Namespace) -> dict:
    sampler = node("PasticheInjectFusionSampler", omega=options.omega, t_boost=options.t_boost, seed=0)
    return sampling_graph(loader, options.steps, "simple", ("inject", 0), ("original", 2), sampler, {
        "original": node("PasticheLoadFeatures", file=original, model=loader.model, memory="disk"),
        "content": node("PasticheLoadFeatures", file=content, model=loader.model, memory="disk"),
        "inject": node("PasticheHSpaceSlerp", model=loader.model, content=("content", 0), gamma=options.gamma, t_edit=options.t_edit,
                       branch="conditional"),
    })


def measure(table: Table, pairs: list[tuple[Path, Path]], options: argparse.Namespace, note: str) -> str:
    """Our row."""
    import torch
    from published_metrics import GRAM_LAYERS, Networks, attempt, frechet_distance, gram_distance

    networks = Networks(options.weights, options.device)
    results = {pair: load_picture(table.results / f"{name_of(*pair)}.png") for pair in pairs}
    pictures = {path: load_picture(path, options.size) for pair in pairs for path in pair}

    def fid() -> float:
        originals = torch.stack([networks.photo_inception(pictures[path]) for path in dict.fromkeys(pair[0] for pair in pairs)])
        return frechet_distance(torch.stack([networks.photo_inception(result) for result in results.values()]), originals)

    def identity() -> float:
        return mean(float(networks.face(result) @ networks.face(pictures[pair[1]])) for pair, result in results.items())

    def gram() -> float:
        return mean(gram_distance(networks.vgg19(result, GRAM_LAYERS), networks.vgg19(pictures[pair[0]], GRAM_LAYERS))
                    for pair, result in results.items())

    with torch.inference_mode():
        found = attempt("FID", fid), attempt("ID", identity), attempt("Gram", gram)
    digits = [shown(value, count) for value, count in zip(found, (2, 4, 4))]
    return f"| Pastiche, {options.model.stem}{note} | {len(pairs)} | " + " | ".join(digits) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
