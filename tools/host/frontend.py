"""ComfyUI's own front end in a `Browser`: load graphs, find what is wrong with them, queue them, point at nodes.

    with Server(host, base) as server, Browser() as page:
        ui = Frontend(page, server)
        ui.open()
        ui.load(json.loads(path.read_text()))     # a workflow in UI format
        assert not ui.problems()
        result = ui.queue()                        # presses Run and waits; a comfy.Result
        page.click(*ui.point("Content", 0.5, 0.2)) # half across and a fifth down the node titled "Content"
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .browser import Browser
from .comfy import Result, Server, ServerError

# Messages of ComfyUI's front end itself that any page of it may log.
_HARMLESS = ("favicon", "ComfyApp graph accessed before initialization")

_FIND = """(which) => {
    const node = app.graph.nodes.find((n) => String(n.id) === String(which) || n.title === which || n.type === which);
    if (!node) throw new Error(`no node ${which} among ${app.graph.nodes.map((n) => n.title).join(", ")}`);
    return node;
}"""


class Frontend:
    def __init__(self, page: Browser, server: Server):
        self.page, self.server = page, server
        self._seen = 0

    def open(self) -> None:
        """Loads the page and waits until an empty graph is on the canvas."""
        self.page.open(self.server.url)
        self.page.wait_for("() => window.app?.isGraphReady && app.extensionManager?.command", timeout=60)
        # the initial graph arrives a moment after the app
        self.page.wait_for("() => app.graph.nodes.length > 0 || performance.now() > 15000", timeout=30)
        self.load({"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}})

    def load(self, workflow: dict[str, Any]) -> None:
        """Loads a workflow in UI format, as dropping its file on the canvas does; forgets earlier console messages."""
        self._seen = len(self.page.console)
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow, true, true, 'test'); }", workflow)
        self._settle(len(workflow["nodes"]))

    def load_api(self, prompt: dict[str, Any], name: str = "workflow") -> None:
        """Loads a graph in API format. Raises ValueError for node types that the page does not know."""
        self._seen = len(self.page.console)
        known = "(types) => types.filter((type) => !LiteGraph.registered_node_types[type])"
        unknown = self.page.evaluate(known, sorted({node["class_type"] for node in prompt.values()}))
        if unknown:
            raise ValueError(f"unknown node types: {', '.join(unknown)}")
        self.page.evaluate("async (prompt, name) => { await app.loadApiJson(prompt, name); }", prompt, name)
        self._settle(len(prompt))

    def open_template(self, name: str, picture: Path | None = None) -> None:
        """Opens the pack's template from the Templates dialog, with the mouse; keeps a picture of the grid if told."""
        before = self.page.evaluate("() => app.graph.id")
        self.page.do(lambda page: page.get_by_role("button", name="Templates").first.click())
        self.page.do(lambda page: page.get_by_role("button", name="Pastiche", exact=True).first.click())
        card = lambda page: page.get_by_test_id(f"template-workflow-{name}")  # noqa: E731
        self.page.do(lambda page: card(page).wait_for(timeout=20_000))
        if picture:
            time.sleep(2)  # the thumbnails
            self.page.screenshot(picture)
        self._seen = len(self.page.console)  # the dialog looks for templates of ComfyUI's own, which may not be installed
        self.page.do(lambda page: card(page).click())
        self.page.wait_for("(before) => app.graph.id !== before && app.graph.nodes.length > 0", before)
        time.sleep(1.5)  # missing models and media are looked up after the graph is there

    def _settle(self, nodes: int) -> None:
        self.page.wait_for("(count) => app.graph.nodes.length >= count", nodes)
        time.sleep(1)  # missing models and media are looked up after the graph is there
        if nodes:
            self.command("Comfy.Canvas.FitView")
            time.sleep(0.5)

    def problems(self) -> list[str]:
        """Missing node types, nodes drawn with a red box, validation errors, error messages on the page or the console."""
        found = self.page.evaluate(
            """() => {
                const found = [];
                for (const node of app.graph.nodes) {
                    if (!LiteGraph.registered_node_types[node.type] && !node.isVirtualNode && !node.isSubgraphNode?.())
                        found.push(`missing node type ${node.type}`);
                    if (node.has_errors) found.push(`red box around ${node.title} (${node.type})`);
                    for (const input of node.inputs ?? [])
                        if (input.hasErrors) found.push(`red input ${input.name} of ${node.title}`);
                }
                for (const [id, error] of Object.entries(app.lastNodeErrors ?? {}))
                    found.push(`${error.class_type} (node ${id}): ${error.errors.map((e) => `${e.message}: ${e.details}`).join("; ")}`);
                if (app.lastExecutionError) found.push(`execution error: ${app.lastExecutionError.exception_message}`);
                for (const box of document.querySelectorAll("[data-testid=error-overlay], .p-toast-message-error, .p-dialog-mask"))
                    if (box.innerText.trim()) found.push(`on the page: ${box.innerText.trim().replace(/\\s+/g, " ").slice(0, 300)}`);
                return found;
            }"""
        )
        return found + [f"console: {text}" for text in self.console_errors()]

    def console_errors(self) -> list[str]:
        """Console errors since the last load."""
        recent = self.page.console[self._seen :]
        return [text for level, text in recent if level == "error" and not any(known in text for known in _HARMLESS)]

    def serialize(self) -> dict[str, Any]:
        """The graph in UI format."""
        return self.page.evaluate("() => app.graph.serialize()")

    def prompt(self) -> dict[str, Any]:
        """The graph in API format, as Run sends it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def queue(self, timeout: float = 600) -> Result:
        """Presses the Run button and waits for the prompt to finish. Raises ServerError with what went wrong."""
        before = set(self.server.get("/history"))
        x, y = self.page.evaluate(
            """() => {
                const box = document.querySelector("[data-testid=queue-button]").getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }"""
        )
        self.page.click(x, y)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.server.get("/history")
            new = [key for key in history if key not in before]
            if new:
                entry = history[new[0]]
                if entry["status"]["status_str"] != "success":
                    raise ServerError(f"the prompt ended with {entry['status']}")
                time.sleep(1)  # let the page show it
                return Result(new[0], entry["outputs"])
            errors = self.page.evaluate("() => Object.keys(app.lastNodeErrors ?? {}).length")
            if errors:
                raise ServerError("; ".join(self.problems()))
            time.sleep(0.3)
        raise ServerError(f"nothing finished within {timeout:.0f} s. {self.server.log_end()}")

    def command(self, identifier: str) -> None:
        """Runs one of the front end's commands, such as Comfy.Canvas.FitView."""
        self.page.evaluate("async (id) => { await app.extensionManager.command.execute(id); }", identifier)

    def set_setting(self, identifier: str, value: Any) -> None:
        """Changes a setting, for example ("Comfy.VueNodes.Enabled", True) for Nodes 2.0."""
        self.page.evaluate("async (id, value) => { await app.extensionManager.setting.set(id, value); }", identifier, value)

    def point(self, node: int | str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Window position of a point of a node (its id, title or type); (0, 0) is its body's top left corner."""
        return tuple(
            self.page.evaluate(
                f"(which, x, y) => {{ const n = ({_FIND})(which);"
                " return app.canvasPosToClientPos([n.pos[0] + n.size[0] * x, n.pos[1] + n.size[1] * y]); }",
                node, across, down,
            )
        )

    def widget(self, node: int | str, name: str) -> Any:
        """The value of a node's widget."""
        return self.page.evaluate(f"(which, name) => ({_FIND})(which).widgets.find((w) => w.name === name).value", node, name)

    def set_widget(self, node: int | str, name: str, value: Any) -> None:
        """Sets a widget as typing into it would, callback included."""
        self.page.evaluate(
            f"(which, name, value) => {{ const w = ({_FIND})(which).widgets.find((w) => w.name === name);"
            " w.value = value; w.callback?.(value); app.graph.setDirtyCanvas(true, true); }",
            node, name, value,
        )
