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
    MINI, PLUMBING, RANDOM, Table, checkpoint_loader, choose_pairs, inversion_graph, load_picture, mean, node, pictures_of,
    sampling_graph, shown,
)
from host import environment  # isort: skip  (tables makes it importable)

HEAD = "| | pairs | ArtFID | FID | LPIPS | CFSD |\n|---|---|---|---|---|---|"
PAPER = "| StyleID, the paper's (SD1.4, 512 px) | 800 | 28.801 | 18.131 | 0.5055 | 0.2281 |"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="an SD checkpoint's file, or mini")
    parser.add_argument("--data", type=Path, required=True, help="folder with cnt/ and sty/")
    parser.add_argument("--weights", required=True, help="folder of the measures' weights, or random")
    parser.add_argument("--pairs", type=int, help="fewer than all, from the first pictures on")
    parser.add_argument("--work", type=Path, default=Path("output/styleid_table"), help="what is done is kept here")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--gamma", type=float, default=0.75)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--layers", default="6-11")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.checkpoint != MINI and not Path(options.checkpoint).is_file():
        print(f"error: --checkpoint: {options.checkpoint} is not a file.", file=sys.stderr)
        return 2
    if options.weights != RANDOM and not Path(options.weights).is_dir():
        print(f"error: --weights: {options.weights} is not a folder.", file=sys.stderr)
        return 2
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    return make(host, options) if code is None else code


def make(host: environment.Host, options: argparse.Namespace) -> int:
    contents, styles = (pictures_of(options.data / name) for name in ("cnt", "sty"))
    pairs = choose_pairs(contents, styles, options.pairs)
    settings = {key: str(getattr(options, key)) for key in ("checkpoint", "data", "size", "steps", "gamma", "temperature", "layers")}
    table = Table(options.work, settings)
    if not table.complete(name_of(*pair) for pair in pairs):
        draw(table, host, pairs, options)
    lines = [HEAD, PAPER, measure(table, pairs, options)]
    text = "\n".join([
        f"# StyleID's reference table, {describe(options)}", "", *([PLUMBING, ""] if options.weights == RANDOM else []),
        f"{options.size} px, {options.steps} steps, gamma {options.gamma}, temperature {options.temperature}, layers {options.layers}; "
        "see benchmarks/styleid_table.py for the measures.", "", *lines,
    ]) + "\n"
    print(text)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text)
    return 0


def name_of(content: Path, style: Path) -> str:
    """The authors' file name, without its extension."""
    return f"{content.stem}_stylized_{style.stem}"


def describe(options: argparse.Namespace) -> str:
    model = "the mini model" if options.checkpoint == MINI else Path(options.checkpoint).stem
    return model + (" (random networks)" if options.weights == RANDOM else "")


def draw(table: Table, host: environment.Host, pairs: list[tuple[Path, Path]], options: argparse.Namespace) -> None:
    """Inverts every picture and makes every pair's, in a server of our own."""
    with table.server(host, cpu=options.device == "cpu") as server:
        name = options.checkpoint if options.checkpoint == MINI else table.provide(Path(options.checkpoint), "checkpoints")
        loader = checkpoint_loader(name)

        def inversion(picture: str, prefix: str) -> dict:
            return inversion_graph(loader, picture, options.size, options.steps, "normal", "self_attention", options.layers, prefix)

        banks = {}
        for role, column in (("cnt", 0), ("sty", 1)):
            for picture in dict.fromkeys(pair[column] for pair in pairs):
                banks[role, picture] = table.invert(server, role, picture, inversion)
        for content, style in pairs:
            table.picture(server, name_of(content, style), pair_graph(loader, banks["cnt", content], banks["sty", style], options))


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
