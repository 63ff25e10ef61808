// Sample Picture: shows the chosen picture before any run, and makes way for Load Image.
import { app } from "../../scripts/app.js";
import { chain } from "./chain.js";
import { say } from "./texts.js";

const NODE = "PasticheSamplePicture";
const HEIGHT = 200;

app.registerExtension({
  name: "pastiche.samplePicture",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addPreview(node);
  },
});

function addPreview(node) {
  const choice = node.widgets.find((widget) => widget.name === "picture");
  const image = document.createElement("img");
  image.style.cssText = "width: 100%; height: 100%; object-fit: contain; pointer-events: none;";
  const show = () => {
    const url = new URL(`./samples/${encodeURIComponent(choice.value)}.jpg`, import.meta.url).href;
    image.alt = choice.value;
    image.src = url;
    node.pasticheSource = url; // for FastSAM Prompt's picker
  };
  node.addDOMWidget("preview", "pastiche_sample", image, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT }).serialize = false;
  const button = node.addWidget("button", "Use my own picture", null, () => replaceByLoadImage(node), { serialize: false });
  button.serialize = false;
  button.label = say("Use my own picture");

  chain(choice, "callback", show);
  chain(node, "onConfigure", show);
  show();
}

/** Puts a Load Image with the same title, place and links where `node` is: both give IMAGE, then MASK. */
function replaceByLoadImage(node) {
  const graph = node.graph;
  const load = window.LiteGraph.createNode("LoadImage");
  app.canvas?.emitBeforeChange?.();
  graph.add(load);
  load.pos = [...node.pos];
  load.setSize([Math.max(load.size[0], node.size[0]), Math.max(load.size[1], node.size[1])]);
  load.title = node.title;
  node.outputs.forEach((output, slot) => {
    for (const id of [...(output.links ?? [])]) {
      const link = graph.getLink?.(id) ?? graph.links[id];
      const target = graph.getNodeById(link.target_id);
      if (target) load.connect(slot, target, link.target_slot);
    }
  });
  graph.remove(node);
  app.canvas?.selectNode?.(load);
  app.canvas?.emitAfterChange?.();
}
