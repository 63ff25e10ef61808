#!/usr/bin/env python3
"""StyleID's reference table (40 styles x 20 contents) with the pack's own nodes in a real ComfyUI, beside the paper's row.

    python benchmarks/styleid_table.py --checkpoint sd-v1-4.ckpt --data data --weights weights --device cuda
    python benchmarks/styleid_table.py --checkpoint mini --data data --weights random --pairs 4 --size 128 --steps 4

--data has cnt/ (contents) and sty/ (styles), as the authors' repository. Results are called <content>_stylized_<style>.png,
as theirs, so that their evaluation runs on --work/results too. Every picture is inverted once; what is done is kept in
--work (at 512 px and 50 steps some 0.6 GB a picture), and the same command goes on after an interruption. --weights: see published_metrics.py for its files; a measure
whose file or package is missing is left out with a line that says so; `random` tries the plumbing.
FID: art-inception features of the results against those of each pair's style; ArtFID = (1 + LPIPS)(1 + FID).
COMFYUI_PATH selects a ComfyUI of yours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tables import (
    MINI, Table, checkpoint_loader, choose_pairs, inversion_graph, load_picture, mean, node, options_parser, pictures_of, random_note,
    run_table, sampling_graph, shown, write_table,
)
from host.environment import Host  # isort: skip  (tables makes it importable)

HEAD = "| | pairs | ArtFID | FID | LPIPS | CFSD |\n|---|---|---|---|---|---|"
PAPER = "| StyleID, the paper's (SD1.4, 512 px) | 800 | 28.801 | 18.131 | 0.5055 | 0.2281 |"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_parser(__file__, __doc__, "cnt/ and sty/", 512)
    parser.add_argument("--checkpoint", required=True, help="an SD checkpoint's file, or mini")
    parser.add_argument("--gamma", type=float, default=0.75)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--layers", default="6-11")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    there = options.checkpoint == MINI or Path(options.checkpoint).is_file()
    return run_table(__file__, arguments, options, None if there else f"--checkpoint: {options.checkpoint} is not a file.", make)


def make(host: Host, options: argparse.Namespace) -> int:
    contents, styles = (pictures_of(options.data / name) for name in ("cnt", "sty"))
    pairs = choose_pairs(contents, styles, options.pairs)
    table = Table.of(options, "checkpoint", "gamma", "temperature", "layers")
    if not table.complete(name_of(*pair) for pair in pairs):
        draw(table, host, pairs, options)
    settings = f"gamma {options.gamma}, temperature {options.temperature}, layers {options.layers}"
    title = f"StyleID's reference table, {describe(options)}"
    return write_table(options, __file__, title, settings, [HEAD, PAPER, measure(table, pairs, options)])


def name_of(content: Path, style: Path) -> str:
    """The authors' file name, without its extension."""
    return f"{content.stem}_stylized_{style.stem}"


def describe(options: argparse.Namespace) -> str:
    model = "the mini model" if options.checkpoint == MINI else Path(options.checkpoint).stem
    return model + random_note(options)


def draw(table: Table, host: Host, pairs: list[tuple[Path, Path]], options: argparse.Namespace) -> None:
    """Inverts every picture and makes every pair's, in a server of our own."""
    with table.server(host, cpu=options.device == "cpu") as server:
        name = options.checkpoint if options.checkpoint == MINI else table.provide(Path(options.checkpoint), "checkpoints")
        loader = checkpoint_loader(name)

        def inversion(picture: str, prefix: str) -> dict:
            return inversion_graph(loader, picture, options.size, options.steps, "normal", "self_attention", options.layers, prefix)

        for pair, banks in zip(pairs, table.invert_all(server, ("cnt", "sty"), pairs, inversion)):
            table.picture(server, name_of(*pair), pair_graph(loader, *banks, options))


def pair_graph(loader, content: str, style: str, options: argparse.Namespace) -> dict:
    """StyleID from two saved inversions: AdaIN of the noise, injection, 1 run."""
    return sampling_graph(loader, options.steps, "normal", ("inject", 0), ("tones", 0), node("KSamplerSelect", sampler_name="euler"), {
        "content": node("PasticheLoadFeatures", file=content, model=loader.model, memory="disk"),
        "style": node("PasticheLoadFeatures", file=style, model=loader.model, memory="disk"),
        "tones": node("PasticheLatentAdaIN", content=("content", 2), style=("style", 2), strength=1.0),
        "inject": node("PasticheStyleInjection", model=loader.model, style=("style", 0), content=("content", 0), gamma=options.gamma,
                       temperature=options.temperature, strength=1.0, layers=options.layers, start_percent=0.0, end_percent=1.0),
    })


def measure(table: Table, pairs: list[tuple[Path, Path]], options: argparse.Namespace) -> str:
    """Our row."""
    import torch
    from published_metrics import CFSD_LAYER, Networks, art_fid, attempt, cfsd, frechet_distance

    networks = Networks(options.weights, options.device)
    results = {pair: load_picture(table.results / f"{name_of(*pair)}.png") for pair in pairs}
    originals = {path: load_picture(path, options.size) for pair in pairs for path in pair}

    def fid() -> float:
        style = {path: networks.art_inception(originals[path]) for path in {pair[1] for pair in pairs}}
        return frechet_distance(torch.stack([networks.art_inception(result) for result in results.values()]),
                                torch.stack([style[style_path] for _, style_path in pairs]))

    def content_distance() -> float:
        return mean(networks.lpips(result, originals[pair[0]]) for pair, result in results.items())

    def similarity() -> float:
        def features(image):
            return networks.vgg19(image, (CFSD_LAYER,))[0]

        content = {path: features(originals[path]) for path in {pair[0] for pair in pairs}}
        return mean(cfsd(features(result), content[pair[0]]) for pair, result in results.items())

    with torch.inference_mode():
        found_fid, lpips, found_cfsd = attempt("FID", fid), attempt("LPIPS", content_distance), attempt("CFSD", similarity)
    both = None if found_fid is None or lpips is None else art_fid(found_fid, lpips)
    digits = [shown(value, count) for value, count in ((both, 3), (found_fid, 3), (lpips, 4), (found_cfsd, 4))]
    return f"| Pastiche, {describe(options)} | {len(pairs)} | " + " | ".join(digits) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
