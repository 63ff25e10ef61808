"""A mistake is told on the page: as a note and under the node, in the classic canvas and in Nodes 2.0."""

import pytest
from support.live import small_prompt, workflow_by_name

TEXT = """(type) => {
    const node = app.graph.nodes.find((n) => n.type === type);
    return node.widgets.find((w) => w.name === "$$node-text-preview")?.value ?? null;
}"""


@pytest.mark.parametrize("mode", ["classic", "nodes2"])
def test_guidance_where_there_should_be_none(ui, mode):
    ui.set_setting("Comfy.VueNodes.Enabled", mode == "nodes2")
    try:
        ui.load_api(small_prompt(workflow_by_name("styleid_mini")))
        ui.set_widget("SamplerCustom", "cfg", 7.0)
        ui.queue()
        note = "() => [...document.querySelectorAll('.p-toast-message')].map((n) => n.innerText).find((t) => t.includes('cfg is 7'))"
        shown = ui.page.wait_for(note)
        assert "Style Injection" in shown and "Set cfg to 1" in shown
        assert "Set cfg to 1" in ui.page.wait_for(TEXT, "PasticheStyleInjection")

        ui.set_widget("SamplerCustom", "cfg", 1.0)
        ui.queue()
        assert ui.page.evaluate(TEXT, "PasticheStyleInjection") is None  # the next run takes the sentence away
    finally:
        ui.page.evaluate("() => app.extensionManager.toast.removeAll?.()")
        ui.set_setting("Comfy.VueNodes.Enabled", False)
