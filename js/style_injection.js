// Style Injection: content above style, as pictures and inversions stand in a graph, so that links do not cross.
// ComfyUI lists what is required first; the front end finds the inputs of saved workflows by their names.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "pastiche.styleInjection",
  nodeCreated(node) {
    if (node.comfyClass !== "PasticheStyleInjection") return;
    const [style, content] = ["style", "content"].map((name) => node.inputs.findIndex((input) => input.name === name));
    if (style >= 0 && content > style) node.inputs.splice(style, 0, ...node.inputs.splice(content, 1));
  },
});
