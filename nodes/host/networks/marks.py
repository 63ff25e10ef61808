"""Which of our nodes already change a MODEL's sampling."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

MARK = "pastiche_injected"  # in model_options: the display names of the nodes, in the order they were applied


def injected_by(model: ModelPatcher) -> tuple[str, ...]:
    """Display names of the injections that a MODEL carries, first applied first; empty for a plain one."""
    return model.model_options.get(MARK, ())


def mark_injected(model: ModelPatcher, node: str) -> None:
    """Notes on `model` (a clone) that the node called `node` changes its sampling."""
    model.model_options[MARK] = (*injected_by(model), node)


def require_plain(model: ModelPatcher, consequence: str) -> None:
    """Raises ValueError for a MODEL that carries an injection; `consequence` says what would happen to it ("would be ...")."""
    nodes = injected_by(model)
    if nodes:
        names = " and ".join(dict.fromkeys(nodes))
        raise ValueError(f"model: it already carries {names}, which {consequence}. Connect the model from before {nodes[0]}.")
