// Style Library: a gallery on the node, in both canvases.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { chain } from "./chain.js";
import { deleteStyle, fetchLibrary, pictureUrl, setLimit } from "./style_library_server.js";
import { Gallery } from "./style_library_view.js";
import { say } from "./texts.js";

const NODE = "PasticheStyleLibrary";
const OUTPUT = "pastiche_library"; // this node's part of an `executed` message, and the event of a refused style
const SAVED = "pastiche_saved"; // what Save Features and Save Style LoRA put into theirs
const LEAST_HEIGHT = 300;
const LEAST_WIDTH = 360;

const galleries = new Set(); // of all nodes on the page: what one deletes the others lose

app.registerExtension({
  name: "pastiche.styleLibrary",
  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./style_library.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener("executed", ({ detail }) => detail?.output?.[SAVED] && refreshAll());
    api.addEventListener(OUTPUT, ({ detail }) => galleries.forEach((gallery) => gallery.told(detail)));
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addGallery(node);
  },
});

const refreshAll = () => Promise.all([...galleries].map((gallery) => gallery.refresh()));

function addGallery(node) {
  const choice = node.widgets.find((widget) => widget.name === "style");
  let alive = true;

  const refresh = async () => {
    try {
      const library = await fetchLibrary();
      if (choice.options) choice.options.values = library.styles.map((style) => style.key);
      view.show(library);
    } catch (error) {
      view.tell(say("The list cannot be read: {why}", { why: error.message }), true);
    }
  };
  /** Runs what changes the library, and shows what became of it. */
  const change = async (run) => {
    view.busy = true;
    view.tell(say("Waiting for the queue ..."));
    let trouble = "";
    try {
      await run();
    } catch (error) {
      trouble = error.message;
    }
    view.busy = false;
    await refreshAll();
    view.tell(trouble, Boolean(trouble));
  };
  const view = new Gallery({
    picture: pictureUrl,
    choose: ({ key }) => {
      if (choice.value === key) return;
      app.canvas?.emitBeforeChange?.();
      choice.value = key;
      choice.callback?.(key);
      node.graph?.setDirtyCanvas(true, true);
      app.canvas?.emitAfterChange?.(); // the workflow's own undo takes note
    },
    remove: (style) => change(() => deleteStyle(style, () => alive)),
    limit: (megabytes) => change(() => setLimit(megabytes, () => alive)),
    refresh: refreshAll,
  });
  const gallery = {
    refresh,
    told: ({ node: id, ...hand }) => {
      const path = String(id).split(":");
      const inside = node.graph && node.graph !== (app.rootGraph ?? app.graph);
      if (path.at(-1) === String(node.id) && inside === path.length > 1) view.setModel(hand);
    },
  };
  galleries.add(gallery);

  const widget = node.addDOMWidget("gallery", "pastiche_library", view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => LEAST_HEIGHT,
  });
  widget.serialize = false;
  node.setSize?.([Math.max(node.size[0], LEAST_WIDTH), Math.max(node.size[1], node.computeSize()[1])]);

  const follow = () => view.select(choice.value);
  chain(choice, "callback", follow);
  chain(node, "onConfigure", follow);
  chain(node, "onExecuted", (output) => {
    const hand = output?.[OUTPUT]?.[0];
    if (hand) view.setModel(hand);
  });
  chain(node, "onConnectionsChange", (side, slot) => {
    if (node.inputs?.[slot]?.name === "model" && side === window.LiteGraph.INPUT) view.setModel(null); // another model is known after a run
  });
  chain(node, "onRemoved", () => {
    alive = false;
    galleries.delete(gallery);
    view.destroy();
  });
  refresh().then(follow);
}
