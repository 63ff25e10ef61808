// What the picker looks like: a toolbar, the picture with zoom and pan, and the marks as SVG above it.
//
// Pictures and marks are vector or CSS-scaled, so device pixel ratio and the graph's zoom need no care.

import { ObjectMap } from "./fastsam_objects.js";
import { say } from "./texts.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_ZOOM = 32;
const NONE = []; // no missed points: one list, so that showing the same again is no change
const BUTTONS = [
  ["undo", "↶", "Undo (Ctrl+Z)"],
  ["redo", "↷", "Redo (Ctrl+Shift+Z)"],
  ["remove", "⌫", "Delete the selected mark, or the last (Delete)"],
  ["clear", "✕", "Clear all marks"],
  ["fit", "Fit", "Fit the picture (0)"],
  ["mask", "◐", "Show or hide the mask of the last run"],
  ["large", "⤢", "Large view (L); again or Escape closes it"],
];
const HELP =
  "Left click: take. Right click or Shift: remove. Drag: box; its edges and corners resize it, the middle of a selected one moves it. Alt+click a mark or Delete: delete it. Wheel: zoom, once clicked. Middle or Ctrl+drag: pan. Keys: arrows move the cross, Enter takes, N removes, B starts and ends a box, [ and ] select a mark, L opens the large view.";

export class PickerView {
  /** Pixels [width, height] of the picture, null while there is none. */
  size = null;
  /** Called when a picture of a new size is there. */
  onReady = () => {};

  #scale = 1; // CSS pixels of the viewport a picture pixel takes
  #offset = [0, 0];
  #fitted = true;
  #shown = {};
  #drawn = null;

  constructor() {
    this.element = html("div", "pastiche-picker");
    const bar = html("div", "pastiche-picker-bar", this.element);
    this.buttons = {};
    for (const [name, sign, label] of BUTTONS) {
      const button = html("button", "", bar);
      Object.assign(button, { type: "button", title: say(label), textContent: say(sign) });
      button.setAttribute("aria-label", say(label));
      button.dataset.action = name;
      this.buttons[name] = button;
    }
    this.viewport = html("div", "pastiche-picker-view", this.element);
    this.viewport.tabIndex = 0;
    this.viewport.title = say(HELP);
    this.viewport.dataset.captureWheel = "true"; // Nodes 2.0: the focused picker keeps the wheel
    this.viewport.type = "textarea"; // the workflow's Ctrl+Z spares the focused element of this type: the picker has its own
    this.viewport.setAttribute("role", "application");
    this.viewport.setAttribute("aria-label", say("Point and box picker. {help}", { help: say(HELP) }));
    this.stage = html("div", "pastiche-picker-stage", this.viewport);
    this.image = html("img", "", this.stage);
    this.mask = html("img", "pastiche-picker-mask", this.stage);
    for (const picture of [this.image, this.mask]) Object.assign(picture, { alt: "", draggable: false });
    this.mask.hidden = true;
    this.objects = new ObjectMap();
    this.stage.append(this.objects.canvas);
    this.svg = this.stage.appendChild(document.createElementNS(SVG, "svg"));
    this.note = html("div", "pastiche-picker-note", this.viewport);
    this.status = html("div", "pastiche-picker-status", this.element);
    this.status.setAttribute("aria-live", "polite");
    this.image.onload = () => this.#loaded();
    this.image.onerror = () => this.#failed();
    this.resizing = new ResizeObserver(() => (this.#fitted ? this.fit() : this.#place()));
    this.resizing.observe(this.viewport);
  }

  destroy() {
    this.closeLarge();
    this.objects.load("");
    this.resizing.disconnect();
    for (const picture of [this.image, this.mask]) {
      picture.onload = picture.onerror = null;
      picture.removeAttribute("src");
    }
    this.element.remove();
  }

  /**
   * Show {url, width?, height?, mask?, map?, note?, missed?}, or null for none. width and height: pixels of the
   * image as nodes get it, where they are not the file's. map: the last run's objects; missed: the points [x, y]
   * at which it found none. A url of "" with a width and height is an empty sheet of that size.
   */
  show(picture) {
    const { url = "", mask = "", map = "", width, height, note = "", missed = NONE } = picture ?? {};
    const shown = { url, mask, map, width, height, note, missed };
    if (Object.keys(shown).every((key) => this.#shown[key] === shown[key])) return;
    const changed = this.#shown.url !== url;
    this.#shown = shown;
    this.objects.load(map);
    this.mask.hidden = !mask || this.mask.dataset.off === "true";
    if (mask) this.mask.src = mask;
    else this.mask.removeAttribute("src");
    this.setStale(false);
    if (!url) {
      this.image.removeAttribute("src");
      if (width && height) this.#resize(width, height);
      else this.size = null;
    } else if (changed) this.image.src = url;
    else if (this.image.complete) this.#loaded();
    this.#redraw();
  }

  setStale(stale) {
    this.mask.classList.toggle("stale", stale);
  }

  toggleMask() {
    const off = this.mask.dataset.off !== "true";
    this.mask.dataset.off = String(off);
    this.mask.hidden = off || !this.mask.hasAttribute("src");
    this.#redraw();
  }

  #loaded() {
    const { width = this.image.naturalWidth, height = this.image.naturalHeight } = this.#shown;
    if (!width || !height) return this.#failed();
    this.#resize(width, height);
  }

  /** Zoom, pan and the marks' history stay as they are where the picture keeps its size. */
  #resize(width, height) {
    if (this.size?.[0] === width && this.size[1] === height) return this.#redraw();
    this.size = [width, height];
    Object.assign(this.stage.style, { width: `${width}px`, height: `${height}px` });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.fit();
    this.onReady();
  }

  #failed() {
    if (!this.#shown.url) return;
    this.size = null;
    this.#redraw();
  }

  /** Highlight the object of the last run under a position of the picture, null for none. */
  hover(at) {
    this.objects.highlight(at && this.size ? this.objects.at(at.x / this.size[0], at.y / this.size[1]) : 0);
  }

  // ---- the large view: the same element, in a dialog over the page ----

  get large() {
    return Boolean(this.dialog);
  }

  toggleLarge() {
    if (this.large) return this.closeLarge();
    this.home = html("div", "pastiche-picker-home");
    this.element.replaceWith(this.home);
    this.dialog = html("dialog", "pastiche-picker-large", document.body);
    this.dialog.append(this.element);
    this.dialog.addEventListener("close", () => this.closeLarge());
    this.dialog.addEventListener("cancel", (event) => event.preventDefault()); // Escape lets go of a mark first
    this.dialog.addEventListener("pointerdown", (event) => event.target === this.dialog && this.closeLarge());
    this.dialog.showModal();
    this.buttons.large.setAttribute("aria-pressed", "true");
    this.viewport.focus();
  }

  closeLarge() {
    const { dialog } = this;
    if (!dialog) return;
    this.dialog = null;
    this.home.replaceWith(this.element);
    dialog.remove();
    this.buttons.large.setAttribute("aria-pressed", "false");
  }

  // ---- zoom and pan; positions in CSS pixels of the viewport ----

  fit() {
    this.#fitted = true;
    if (!this.size) return;
    const { clientWidth, clientHeight } = this.viewport;
    if (!clientWidth || !clientHeight) return;
    this.#scale = this.#fitScale();
    this.#offset = [(clientWidth - this.size[0] * this.#scale) / 2, (clientHeight - this.size[1] * this.#scale) / 2];
    this.#place();
  }

  zoom(factor) {
    this.#zoomTo(this.viewport.clientWidth / 2, this.viewport.clientHeight / 2, factor);
  }

  zoomAt(event, factor) {
    this.#zoomTo(...this.#local(event), factor);
  }

  /** Moves the picture by screen pixels. */
  pan(dx, dy) {
    const ratio = this.#ratio();
    this.#fitted = false;
    this.#offset = [this.#offset[0] + dx / ratio, this.#offset[1] + dy / ratio];
    this.#place();
  }

  #fitScale() {
    return Math.min(this.viewport.clientWidth / this.size[0], this.viewport.clientHeight / this.size[1]);
  }

  #zoomTo(x, y, factor) {
    if (!this.size) return;
    const least = this.#fitScale();
    const scale = Math.min(Math.max(this.#scale * factor, least), Math.max(MOST_ZOOM, least));
    if (scale <= least) return this.fit();
    const change = scale / this.#scale;
    this.#fitted = false;
    this.#offset = [x - (x - this.#offset[0]) * change, y - (y - this.#offset[1]) * change];
    this.#scale = scale;
    this.#place();
  }

  #place() {
    if (this.size) {
      // some of the picture stays in sight
      const keep = 24;
      const room = [this.viewport.clientWidth, this.viewport.clientHeight];
      this.#offset = this.#offset.map((value, axis) =>
        Math.min(Math.max(value, keep - this.size[axis] * this.#scale), room[axis] - keep),
      );
    }
    this.stage.style.transform = `translate(${this.#offset[0]}px, ${this.#offset[1]}px) scale(${this.#scale})`;
    this.stage.style.imageRendering = this.#scale >= 4 ? "pixelated" : "";
    this.#redraw();
  }

  /** Screen pixels per CSS pixel of the viewport: the graph's zoom. */
  #ratio() {
    return this.viewport.getBoundingClientRect().width / (this.viewport.offsetWidth || 1) || 1;
  }

  #local(event) {
    const frame = this.viewport.getBoundingClientRect();
    const ratio = this.#ratio();
    return [(event.clientX - frame.left) / ratio - this.viewport.clientLeft, (event.clientY - frame.top) / ratio - this.viewport.clientTop];
  }

  /** Screen pixels per picture pixel. */
  screenScale() {
    return this.#scale * this.#ratio();
  }

  /** Picture position, fractional, of a mouse event. */
  toImage(event) {
    const [x, y] = this.#local(event);
    return { x: (x - this.#offset[0]) / this.#scale, y: (y - this.#offset[1]) / this.#scale };
  }

  /** The picture's pixel at a position. */
  pixel({ x, y }) {
    const inside = (value, length) => Math.min(Math.max(0, Math.floor(value)), length - 1);
    return { x: inside(x, this.size[0]), y: inside(y, this.size[1]) };
  }

  /** The box between two positions, within the picture. */
  box(from, to) {
    const edge = (value, length) => Math.round(Math.min(Math.max(0, value), length));
    const [x1, x2] = [edge(from.x, this.size[0]), edge(to.x, this.size[0])].sort((a, b) => a - b);
    const [y1, y2] = [edge(from.y, this.size[1]), edge(to.y, this.size[1])].sort((a, b) => a - b);
    return { kind: "box", x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
  }

  // ---- marks ----

  draw(state) {
    this.#drawn = state;
    this.#redraw();
  }

  #redraw() {
    const state = this.#drawn;
    if (!state) return;
    const { marks, draft, selected, cursor, locked } = state;
    const unit = 1 / this.#scale; // a CSS pixel of the viewport
    const shapes = [];
    if (this.size) {
      marks.forEach((mark, i) => shapes.push(drawMark(mark, unit, i === selected, this.#isMissed(mark))));
      if (draft) shapes.push(drawMark(draft, unit, true));
      if (cursor) shapes.push(svg("path", { class: "cursor", d: cross(cursor.x, cursor.y, 9 * unit), "stroke-width": 1.5 * unit }));
    }
    this.svg.replaceChildren(...shapes);
    this.buttons.undo.disabled = !state.canUndo;
    this.buttons.redo.disabled = !state.canRedo;
    this.buttons.remove.disabled = this.buttons.clear.disabled = locked || !marks.length;
    this.buttons.fit.disabled = !this.size;
    this.buttons.mask.disabled = !this.mask.hasAttribute("src");
    this.buttons.mask.setAttribute("aria-pressed", String(!this.mask.hidden));
    this.status.textContent = this.status.title = this.#statusText(state);
    this.note.textContent = this.#noteText();
    this.note.hidden = !this.note.textContent;
    this.stage.hidden = !this.size;
  }

  #isMissed(mark) {
    return mark.kind === "positive" && this.#shown.missed.some(([x, y]) => x === mark.x && y === mark.y);
  }

  #statusText({ marks, locked, error }) {
    if (error) return `⚠ ${error}`;
    const boxes = marks.filter((mark) => mark.kind === "box").length;
    const points = marks.length - boxes;
    const counted = [
      points || !boxes ? say(points === 1 ? "{n} point" : "{n} points", { n: points }) : "",
      boxes ? say(boxes === 1 ? "{n} box" : "{n} boxes", { n: boxes }) : "",
    ];
    const empty = this.size ? marks.filter((mark) => this.#isMissed(mark)).length : 0;
    const missed = empty && `⚠ ${say(empty === 1 ? "no object at the hollow point" : "no object at {n} hollow points", { n: empty })}`;
    const text = [missed, counted.filter(Boolean).join(", "), this.size?.join("×"), this.#shown.note].filter(Boolean).join(" · ");
    return locked ? `${text} · ${say("points or boxes come from a link")}` : text;
  }

  #noteText() {
    if (this.size) return this.#shown.url ? "" : say("Not connected: the marks are kept.");
    if (!this.#shown.url) return say("Connect an image. Load Image shows at once, other nodes after a run.");
    return this.image.complete ? say("The picture cannot be shown; run the workflow once.") : "";
  }
}

function drawMark(mark, unit, selected, missed) {
  const name = `mark ${mark.kind}${selected ? " selected" : ""}${missed ? " missed" : ""}`;
  if (mark.kind === "box") {
    const { x, y, width, height } = mark;
    const box = svg("rect", { class: name, x, y, width, height, "stroke-width": (selected ? 3 : 2) * unit });
    if (!selected) return box;
    const side = 7 * unit;
    const grip = (px, py) => svg("rect", { class: "grip", x: px - side / 2, y: py - side / 2, width: side, height: side });
    const group = svg("g", {});
    group.append(box, ...[x, x + width].flatMap((px) => [y, y + height].map((py) => grip(px, py))));
    group.append(svg("path", { class: "grip-move", d: cross(x + width / 2, y + height / 2, 7 * unit), "stroke-width": 2 * unit }));
    return group;
  }
  const [x, y] = [mark.x + 0.5, mark.y + 0.5];
  const radius = (selected ? 8 : 6) * unit;
  const sign = mark.kind === "positive" ? cross(x, y, radius * 0.55) : `M${x - radius * 0.55} ${y}h${radius * 1.1}`;
  const group = svg("g", { class: name, "stroke-width": 1.5 * unit });
  group.append(svg("circle", { cx: x, cy: y, r: radius }), svg("path", { d: sign }));
  return group;
}

const cross = (x, y, arm) => `M${x - arm} ${y}h${2 * arm}M${x} ${y - arm}v${2 * arm}`;

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function html(tag, className, parent) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  return parent ? parent.appendChild(element) : element;
}
