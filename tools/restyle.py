#!/usr/bin/env python3
"""Restyles many pictures: every content with every style, through one or many ComfyUIs.

    python tools/restyle.py photos paintings --workflow styleid_mini --servers http://127.0.0.1:8188,http://10.0.0.2:8188
    python tools/restyle.py photos paintings --pairs pairs.csv --set "Style injection.gamma=0.4" --output restyled
    python tools/restyle.py photos library:ready/comic,ready/woodcut
    python tools/restyle.py photos paintings --ray auto

Finished pictures are skipped, so a run that was stopped goes on where it was. Without --servers and --ray it starts
a headless ComfyUI as tools/demo.py does. docs/folders.md tells the rest. Exit status: 0, or 1 where something is missing.
Needs only the standard library; with Pillow pictures are looked at first, and there is a contact sheet.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from host import environment
from host.comfy import ServerError, make_base
from restyling import UserError
from restyling.crew import Crew
from restyling.jobs import Jobs
from restyling.members import Attached, Made, Own
from restyling.pairs import Job, all_pairs, in_rows, name_jobs, pairs_from, pictures, saved_styles
from restyling.progress import ProgressLine, duration
from restyling.recipe import Recipe, make_recipe
from restyling.results import Results, contact_sheets

LIBRARY = "library:"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contents", type=Path, help="folder of pictures to restyle, or one picture")
    parser.add_argument("styles", help="folder of pictures to take the style from, or one picture; or library:NAME,NAME of the servers' style libraries")
    parser.add_argument("--pairs", type=Path,
                        help="CSV of two columns, content and style: file names in the two folders (default: each with each)")
    parser.add_argument("--workflow", help="a name of workflows/api, or an API-format file of yours (default: styleid_mini; choose_style_mini with library:)")
    parser.add_argument("--set", action="append", default=[], metavar="TITLE.INPUT=VALUE", help="changes an input of the workflow; may be given again")
    parser.add_argument("--content-title", help="title of the node that takes the content (default: Content, or what the templates call it)")
    parser.add_argument("--style-title", help="title of the node that takes the style (default: Style, or what the templates call it)")
    parser.add_argument("--result", help="title of the node that saves the result (default: Result, or the only Save Image)")
    parser.add_argument("--output", type=Path, default=Path("restyled"), help="folder for the results (default: restyled)")
    parser.add_argument("--servers", help="addresses of running ComfyUIs, separated by commas (default: one is started here)")
    parser.add_argument("--ray", metavar="ADDRESS", help='a Ray cluster\'s address, "auto" for the one this machine is in, "local" to start one here')
    parser.add_argument("--workers", type=_positive, help="with --ray: how many workers (default: one a GPU, or one a machine without)")
    parser.add_argument("--keep", type=_positive, default=8,
                        help="styles (contents, where they are fewer) whose inversions a server keeps at a time (default: 8)")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which a lost server is given up (default: 60)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one picture may take (default: 3600)")
    options = parser.parse_args(arguments)
    options.urls = [url.strip() for url in options.servers.split(",") if url.strip()] if options.servers is not None else []
    if options.servers is not None and not options.urls:
        parser.error("--servers names no server")
    if len({url.rstrip("/") for url in options.urls}) != len(options.urls):
        parser.error("--servers names a server twice")
    if options.workers and not options.ray:
        parser.error("--workers is for --ray")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


_positive.__name__ = "whole number"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.urls or options.ray:
        return run(options, None)
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    return run(options, host) if code is None else code


def run(options: argparse.Namespace, host: environment.Host | None) -> int:
    library = options.styles.startswith(LIBRARY)
    workflow = options.workflow or ("choose_style_mini" if library else "styleid_mini")
    recipe = make_recipe(workflow, options.set, options.content_title, options.style_title, options.result)
    if recipe.takes_library != library:
        wanted = "styles of the library, library:NAME,NAME" if recipe.takes_library else "pictures for styles"
        raise UserError(f"--workflow {workflow} takes {wanted}; got {options.styles}")
    contents = pictures(options.contents)
    styles = saved_styles(options.styles.removeprefix(LIBRARY)) if library else pictures(Path(options.styles))
    for folder in (options.contents, Path(options.styles)):
        if folder.is_dir() and options.output.resolve() == folder.resolve():
            raise UserError(f"--output is {folder} itself: the results would be taken for pictures to restyle.")
    pairs = pairs_from(options.pairs, contents, styles) if options.pairs else all_pairs(contents, styles)
    with Results(options.output) as results:
        jobs = name_jobs(pairs, results.recorded)
        results.begin(recipe)
        return work(options, host, recipe, results, jobs)


@contextlib.contextmanager
def _members(options: argparse.Namespace, host: environment.Host | None):
    try:
        attached = [Attached(url, options.timeout) for url in options.urls]
    except ValueError as error:
        raise UserError(f"--servers: {error}") from None
    if options.ray:
        from restyling.on_ray import on_ray

        with on_ray(options.ray, options.urls, options.workers, options.timeout) as members:
            yield members
    elif attached:
        yield attached
    else:
        import torch

        yield [Own(host, make_base(Path(tempfile.mkdtemp(prefix="pastiche-restyle-"))), not torch.cuda.is_available(), options.timeout)]


def work(options: argparse.Namespace, host: environment.Host | None, recipe: Recipe, results: Results, jobs: list[Job]) -> int:
    """Makes what is missing, prints how it went. Returns the exit status."""
    todo = [job for job in jobs if not results.finished(job)]
    rows, carried = in_rows(todo, options.keep)
    queue, started = Jobs(rows), time.monotonic()
    print(f"{len(jobs)} pictures, {len(jobs) - len(todo)} of them finished before", flush=True)
    line = ProgressLine(len(jobs), len(jobs) - len(todo))

    def save(job: Job, made: Made, server: str, seconds: float) -> None:
        results.save(job, made, server, seconds)
        line.done(f"{results.path(job).name}  {seconds:.1f} s, {server}")

    stopped = None
    try:
        if todo:
            with _members(options, host) as members:
                crew = Crew(members, queue, recipe, save, line.tell, carried, options.keep, options.patience)
                crew.run(lambda: line.draw(len(crew.here)))
    except (KeyboardInterrupt, SystemExit) as error:
        stopped = error
    finally:
        line.close()
    missing = len(todo) - queue.finished - len(queue.failed)
    for job, message in queue.failed:
        print(f"failed: {job.content.name} with {job.style.name}: {message}", file=sys.stderr)
    if stopped is None:
        sheets = contact_sheets(results, jobs)
        more = f" and {len(sheets) - 1} more" if len(sheets) > 1 else ""
        print(f"contact sheet  {sheets[0].resolve()}{more}" if sheets else "contact sheet  none: it needs Pillow")
    print(f"results        {results.folder.resolve()}")
    print(f"{queue.finished} made in {duration(time.monotonic() - started)}, {len(queue.failed)} failed, {missing} not tried", flush=True)
    if missing:
        print("The same command goes on where this run ended.", file=sys.stderr)
    if stopped is not None:
        raise stopped
    return int(bool(queue.failed or missing))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names can be anything
    environment.exit_on_signals()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, ServerError, environment.SetupError) as error:
        sys.exit(f"error: {error}")
