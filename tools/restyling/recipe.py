"""The workflow as a prompt for one pair of pictures.

ComfyUI keeps a node's result as long as the node, with the same inputs, is in the next prompt too, whether that prompt
needs it or not. So a prompt carries along, without anything that asks for them, the nodes of the pictures that other
pairs will need again: their inversions and features are not computed a second time. Their ids stay the same from prompt
to prompt, which nodes that know their id need.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

from pastiche_client import Graph, load

from . import UserError

CONTENT_TITLES = ("Content", "My picture", "Photo", "Content: what is injected", "A photo to try it on")
STYLE_TITLES = ("Style", "Painting", "Original: gives the look", "Style library")
_LIBRARY = "PasticheStyleLibrary"
_SAVES = ("SaveImage",)
_SHOWS = ("SaveImage", "PreviewImage", "SaveImageAdvanced")


@dataclass(frozen=True)
class Recipe:
    """A graph and the titles of its two pictures; `result` is the id of the node that saves."""

    graph: Graph
    content: str
    style: str
    result: str

    @property
    def takes_library(self) -> bool:
        """Whether the style is a name of the library, not a picture."""
        return _is_library(self.graph, self.style)

    def prompt(self, content: str, style: str, carried: str = "style", kept: Iterable[str] = ()) -> dict[str, Any]:
        """The graph for two uploaded pictures, or one and a style of the library.

        `carried` says of which side ("content", "style") further pictures ride along: those `kept`, names as uploaded.
        """
        names = {"content": content, "style": style}
        graph = copy.deepcopy(self.graph)
        for side, name in names.items():
            place(graph, getattr(self, side), name)
        mine, passengers = self._branch(carried)
        prompt = {}
        for key, node in graph.items():
            prompt[_own(key, names[carried]) if key in mine else key] = _linked(node, mine, names[carried])
        for name in dict.fromkeys(kept):
            if name == names[carried]:
                continue
            other = Graph({key: copy.deepcopy(self.graph[key]) for key in passengers})
            place(other, getattr(self, carried), name)
            prompt.update((_own(key, name), _linked(node, mine, name)) for key, node in other.items())
        return prompt

    def _branch(self, side: str) -> tuple[set[str], list[str]]:
        """The nodes that hang on this side's picture alone, and those of them that the result needs."""
        other = "content" if side == "style" else "style"
        mine = _below(self.graph, getattr(self, side)) - _below(self.graph, getattr(self, other))
        needed = _above(self.graph, self.result)
        return mine, [key for key in self.graph if key in mine and key in needed]


def make_recipe(
    workflow: str | Path, settings: Iterable[str] = (), content: str | None = None, style: str | None = None, result: str | None = None
) -> Recipe:
    """A workflow with its settings ("Title.input=value"). Titles that are not given are guessed. Raises UserError."""
    try:
        graph = load(workflow)
    except (OSError, ValueError) as error:
        raise UserError(f"--workflow {workflow} cannot be read: {error}") from None
    if not graph or not all(isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict) for node in graph.values()):
        raise UserError(f"--workflow {workflow} is not in API format: in ComfyUI use Workflow, Export (API)")
    for setting in settings:
        _apply(graph, setting)
    content = content or _guess(graph, CONTENT_TITLES, "--content-title", "the content")
    style = style or _guess(graph, STYLE_TITLES, "--style-title", "the style")
    try:
        copy.deepcopy(graph).picture(content, "x.png")
        place(copy.deepcopy(graph), style, "x.png")
    except ValueError as error:
        raise UserError(f"--workflow {workflow}: {error}") from None
    if content == style:
        raise UserError(f"content and style are both {content!r}: --content-title and --style-title must differ")
    key = _saving_node(graph, result)
    needed = _above(graph, key)
    for title in (content, style):
        if not any(_title(graph[node]) == title for node in needed):
            raise UserError(f"{_title(graph[key])!r} does not depend on the picture {title!r}: every result of a row would be the same")
    return Recipe(graph, content, style, key)


def place(graph: Graph, title: str, name: str) -> None:
    """Puts an uploaded picture, or a style of the library, where the graph takes it. Raises ValueError."""
    if _is_library(graph, title):
        graph.set(title, style=name)
    else:
        graph.picture(title, name)


def _is_library(graph: Graph, title: str) -> bool:
    found = [node["class_type"] for node in graph.values() if _title(node) == title]
    return bool(found) and set(found) == {_LIBRARY}


def _apply(graph: Graph, setting: str) -> None:
    """One "Title.input=value"; the value becomes of the type that is there."""
    left, equals, text = setting.partition("=")
    title, dot, name = left.strip().rpartition(".")
    if not equals or not dot or not title or not name:
        raise UserError(f"--set {setting!r} is not of the form \"Title.input=value\"")
    there = graph.titles.get(title, {}).get(name)
    try:
        graph.set(title, **{name: _convert(text, there)})
    except ValueError as error:
        raise UserError(f"--set {setting!r}: {error}") from None


def _convert(text: str, there: Any) -> Any:
    """`text` as a value of the type of `there`. Raises ValueError."""
    if isinstance(there, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(there))
    if kinds and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(there, bool)):
        wanted = "true or false" if kinds == (bool,) else "whole number" if kinds == (int,) else "number"
        raise ValueError(f"{text!r} is no {wanted}; it is {there} now")
    return value


def _guess(graph: Graph, titles: tuple[str, ...], option: str, what: str) -> str:
    there = [title for title in titles if title in graph.titles]
    if there:
        return there[0]
    pictures = [_title(node) for node in graph.values() if node["class_type"] in ("PasticheSamplePicture", "LoadImage")]
    raise UserError(
        f"no node is called {' or '.join(map(repr, titles))}: name the picture of {what} with {option}; "
        f"there are {', '.join(map(repr, pictures)) or 'none'}"
    )


def _saving_node(graph: Graph, title: str | None) -> str:
    if title is not None:
        found = [key for key, node in graph.items() if _title(node) == title]
        if len(found) != 1:
            raise UserError(f"--result {title!r}: {len(found)} nodes have this title; there are {', '.join(map(repr, graph.titles))}")
        return found[0]
    found = [key for key, node in graph.items() if node["class_type"] in _SAVES]
    named = [key for key in found if _title(graph[key]) == "Result"]
    if len(named or found) == 1:
        return (named or found)[0]
    shown = [_title(node) for node in graph.values() if node["class_type"] in _SHOWS]
    raise UserError(f"which node saves the result? Name it with --result; there are {', '.join(map(repr, shown)) or 'no Save Image nodes'}")


def _title(node: dict) -> str:
    return node.get("_meta", {}).get("title") or node["class_type"]


def _links(node: dict) -> set[str]:
    return {str(value[0]) for value in node["inputs"].values() if isinstance(value, list) and len(value) == 2}


def _below(graph: Graph, title: str) -> set[str]:
    """The nodes of a title and all that depend on them."""
    found = {key for key, node in graph.items() if _title(node) == title}
    while True:
        more = {key for key, node in graph.items() if key not in found and _links(node) & found}
        if not more:
            return found
        found |= more


def _above(graph: Graph, key: str) -> set[str]:
    """A node and all it depends on."""
    found, new = {key}, {key}
    while new:
        new = {link for node in new for link in _links(graph[node]) if link in graph} - found
        found |= new
    return found


def _own(key: str, name: str) -> str:
    """The id of a node that belongs to the picture uploaded as `name`, or to a style of the library."""
    return f"{key}_{name.replace('/', '_') if '/' in name else Path(name).stem}"


def _linked(node: dict, mine: set[str], name: str) -> dict:
    """The node with its links to `mine` turned to the picture's own."""
    inputs = {
        key: [_own(str(value[0]), name), value[1]] if isinstance(value, list) and len(value) == 2 and str(value[0]) in mine else value
        for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}
