// Pastiche's front end: the picker of FastSAM Prompt.
import { app } from "../../scripts/app.js";
import { chain } from "./chain.js";
import { sizeOfTexts } from "./fastsam_marks.js";
import { Picker } from "./fastsam_picker.js";
import { findSource, viewUrl } from "./fastsam_source.js";
import { say } from "./texts.js";

const NODE = "PasticheFastSAMPrompt";
const OUTPUT = "pastiche_fastsam"; // this node's part of an `executed` message
const TEXTS = ["points", "boxes"];
const WATCH = 300; // milliseconds; upstream widgets and links announce their changes to nobody
const LEAST_HEIGHT = 260;
const LEAST_WIDTH = 340;

app.registerExtension({
  name: "pastiche.fastsam",
  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./fastsam_picker.css", import.meta.url).href;
    document.head.append(style);
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addPicker(node);
  },
});

function addPicker(node) {
  const widgets = TEXTS.map((name) => node.widgets.find((widget) => widget.name === name));
  const linked = (name) => node.inputs?.some((input) => input.name === name && input.link != null);
  const picker = new Picker({
    read: () => ({ points: widgets[0].value ?? "", boxes: widgets[1].value ?? "", locked: TEXTS.some(linked) }),
    write: (texts) => {
      app.canvas?.emitBeforeChange?.();
      widgets.forEach((widget, i) => (widget.value = texts[TEXTS[i]]));
      node.graph?.setDirtyCanvas(true, true);
      app.canvas?.emitAfterChange?.(); // the workflow's own undo takes note
    },
  });
  const widget = node.addDOMWidget("picker", "pastiche_picker", picker.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => LEAST_HEIGHT,
  });
  widget.serialize = false;
  const phrases = node.widgets.find((other) => other.name === "text");
  if (phrases?.options) Object.assign(phrases.options, { getMinHeight: () => 34, getMaxHeight: () => 48 }); // the room is the picture's
  node.setSize?.([Math.max(node.size[0], LEAST_WIDTH), Math.max(node.size[1], node.computeSize()[1])]);

  /** An empty picture of the marks' own size: a copy without a link still shows them. */
  const sheet = () => {
    const size = sizeOfTexts(...widgets.map((widget) => widget.value));
    return size && { url: "", width: size[0], height: size[1] };
  };
  let run = null; // what the last run showed, and for which source
  const refresh = () => {
    const source = findSource(node, "image");
    const current = run && (!source || source.url === run.source);
    picker.show(current ? run.picture : source ? { url: source.url, note: source.exact ? "" : say("size as loaded") } : sheet());
    picker.sync();
  };
  const timer = setInterval(refresh, WATCH);

  chain(node, "onExecuted", (output) => {
    const shown = output?.[OUTPUT]?.[0];
    if (!shown) return;
    const { image, mask, map, width, height, objects, missed } = shown;
    const note = say(objects === 1 ? "{n} object found" : "{n} objects found", { n: objects });
    const picture = { url: viewUrl(image), mask: viewUrl(mask), map: viewUrl(map), width, height, note, missed };
    run = { source: findSource(node, "image")?.url, picture };
    refresh();
  });
  chain(node, "onConfigure", () => picker.sync(true));
  chain(node, "onRemoved", () => {
    clearInterval(timer);
    picker.destroy();
  });
}
