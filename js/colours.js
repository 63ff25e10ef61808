// Colours of the pack's own sockets and links, in the classic canvas and in Nodes 2.0.
import { app } from "../../scripts/app.js";

export const COLOURS = {
  PASTICHE_TRAJECTORY: "#e8a33d",
  PASTICHE_FEATURES: "#5fb3b3",
  PASTICHE_STYLE: "#d872b0",
  PASTICHE_FASTSAM: "#9acd5a",
};

/** The classic canvas; a colour palette empties what it does not know. */
function paint() {
  Object.assign(app.canvas.default_connection_color_byType, COLOURS);
  Object.assign(app.canvas.constructor.link_type_colors, COLOURS);
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "pastiche.colours",
  setup() {
    const style = document.createElement("style"); // Nodes 2.0
    style.textContent = `:root { ${Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(" ")} }`;
    document.head.append(style);
    paint();
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint, 100));
  },
});
