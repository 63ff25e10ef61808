"""The pack's own socket colours and translations reach the page."""

import json
import re

from support.live import ROOT

from pastiche.nodes import sockets

SOCKETS = sorted(set(re.findall(r'"(PASTICHE_[A-Z_]+)"', "".join(path.read_text() for path in (ROOT / "nodes").rglob("*.py")))))


def test_every_socket_has_a_colour_in_both_canvases(ui):
    assert sockets and len(SOCKETS) >= 4
    colours = ui.page.evaluate("async () => (await import('/extensions/pastiche/colours.js')).COLOURS")
    assert sorted(colours) == SOCKETS and len(set(colours.values())) == len(SOCKETS)
    for palette in (None, "light", "dark"):  # a palette forgets what it does not know
        if palette:
            ui.set_setting("Comfy.ColorPalette", palette)
            ui.page.wait_for("(want) => app.canvas.default_connection_color_byType.PASTICHE_STYLE === want", colours["PASTICHE_STYLE"])
        classic = ui.page.evaluate("(types) => types.map((t) => [app.canvas.default_connection_color_byType[t], app.canvas.constructor.link_type_colors[t]])", SOCKETS)
        assert classic == [[colours[name]] * 2 for name in SOCKETS]
        modern = ui.page.evaluate("(types) => types.map((t) => getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${t}`).trim())", SOCKETS)
        assert modern == [colours[name] for name in SOCKETS]


def test_translations_are_served(server):
    served = server.get("/i18n")["zh"]
    ours = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {name: served["nodeDefs"][name] for name in ours} == ours
    assert served["templateWorkflows"]["category"]["pastiche"]
