// Colours of the pack's own sockets and links, in the classic canvas and in Nodes 2.0.
import { app } from "../../scripts/app.js";

export const COLOURS = {
  PASTICHE_TRAJECTORY: "#e8a33d",
  PASTICHE_FEATURES: "#5fb3b3",
  PASTICHE_STYLE: "#d872b0",
  PASTICHE_FASTSAM: "#9acd5a",
};

/** Gives `map` our colours for good: a palette empties what it does not know, and may name colours of its own. */
function paint(map) {
  for (const [type, colour] of Object.entries(COLOURS)) {
    let named = "";
    Object.defineProperty(map, type, { get: () => named || colour, set: (value) => (named = value), enumerable: true, configurable: true });
  }
}

app.registerExtension({
  name: "pastiche.colours",
  setup() {
    const style = document.createElement("style"); // Nodes 2.0
    style.textContent = `:root { ${Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(" ")} }`;
    document.head.append(style);
    paint(app.canvas.default_connection_color_byType); // the classic canvas
    paint(app.canvas.constructor.link_type_colors);
  },
});
