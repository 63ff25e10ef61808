// Compare Pictures: before and after under a slider, in both canvases.
import { app } from "../../scripts/app.js";
import { chain } from "./chain.js";
import { viewUrl } from "./fastsam_source.js";
import { say } from "./texts.js";

const NODE = "PasticheCompare";
const OUTPUT = "pastiche_compare"; // this node's part of an `executed` message
const HEIGHT = 240;

app.registerExtension({
  name: "pastiche.compare",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addSlider(node);
  },
});

function addSlider(node) {
  const frame = document.createElement("div");
  frame.className = "pastiche-compare";
  frame.style.cssText = "position: relative; width: 100%; height: 100%; overflow: hidden; cursor: ew-resize; touch-action: none;";
  const layer = "position: absolute; inset: 0; width: 100%; height: 100%;";
  const [before, after] = ["before", "after"].map((name) => {
    const image = document.createElement("img");
    image.alt = name;
    image.draggable = false;
    image.style.cssText = `${layer} object-fit: contain; box-sizing: border-box; visibility: hidden; pointer-events: none;`;
    return image;
  });
  const hint = document.createElement("div");
  hint.textContent = say("Run, then drag here: left before, right after");
  hint.style.cssText = `${layer} display: flex; align-items: center; justify-content: center; opacity: 0.5; font: 12px sans-serif; pointer-events: none;`;
  const line = document.createElement("div");
  line.style.cssText = "position: absolute; top: 0; bottom: 0; width: 2px; background: #fff; opacity: 0.8; visibility: hidden; pointer-events: none;";
  frame.append(before, after, hint, line);

  let share = 0.5;
  const draw = () => {
    // the picture may be smaller than the frame: the slider runs over the picture
    const width = frame.clientWidth;
    if (!before.naturalWidth || !after.naturalWidth) return { width, inset: 0 };
    const scale = Math.min(width / before.naturalWidth, frame.clientHeight / before.naturalHeight);
    // rounding may leave a hair below 0, which no padding can be
    const inset = Math.max(0, (width - before.naturalWidth * scale) / 2);
    const above = Math.max(0, (frame.clientHeight - before.naturalHeight * scale) / 2);
    const x = inset + share * (width - 2 * inset);
    // models draw in multiples of 8 pixels: shapes that are nearly the same share one frame, others keep their own
    const ratio = (after.naturalWidth * before.naturalHeight) / (after.naturalHeight * before.naturalWidth);
    const same = ratio > 0.9 && ratio < 1.1;
    after.style.objectFit = same ? "fill" : "contain";
    after.style.padding = same ? `${above}px ${inset}px` : "0";
    after.style.clipPath = `inset(0 0 0 ${x}px)`;
    line.style.left = `${x - 1}px`;
    return { width, inset };
  };
  frame.addEventListener("pointermove", (event) => {
    const bounds = frame.getBoundingClientRect();
    const { width, inset } = draw();
    const x = ((event.clientX - bounds.left) / bounds.width) * width; // the canvas scales its elements
    share = Math.min(1, Math.max(0, (x - inset) / Math.max(1, width - 2 * inset)));
    draw();
  });
  frame.addEventListener("pointerdown", (event) => event.stopPropagation());
  const resized = new ResizeObserver(draw);
  resized.observe(frame);
  before.addEventListener("load", draw);
  after.addEventListener("load", draw);

  const widget = node.addDOMWidget("compare", "pastiche_compare", frame, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT });
  widget.serialize = false;
  chain(node, "onExecuted", (output) => {
    const shown = output?.[OUTPUT];
    if (!shown) return;
    [before, after].forEach((image, i) => {
      image.src = `${viewUrl(shown[i])}&t=${Date.now()}`; // temp files are written anew under one name
      image.style.visibility = "visible";
    });
    line.style.visibility = "visible";
    hint.style.visibility = "hidden";
  });
  chain(node, "onRemoved", () => resized.disconnect());
}
