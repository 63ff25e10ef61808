// The picker of FastSAM Prompt: shows the connected image and edits points and boxes on it.
//
// The node's `points` and `boxes` texts are the only state; everything here can be rebuilt from them.
import { formatMarks, History, parseMarks } from "./fastsam_marks.js";
import { PickerView } from "./fastsam_view.js";

const DRAG = 4; // screen pixels that make a press a drag
const HIT = 9; // screen pixels around a mark that count as on it

export class Picker {
  #history = new History();
  #selected = -1;
  #drag = null;
  #corner = null; // first corner of a box being made with the keyboard
  #written = null; // the texts as last written or read here
  #listeners = new AbortController();
  #cursor = null;

  /**
   * @param store {read(): {points, boxes, locked}, write({points, boxes})}: the node's texts
   */
  constructor(store) {
    this.store = store;
    this.view = new PickerView();
    this.element = this.view.element;
    this.#listen();
    this.view.onReady = () => this.sync(true);
    this.#render();
  }

  /** Take over texts changed from outside: typing, loading, undo. */
  sync(force = false) {
    const { points, boxes } = this.store.read();
    const text = `${points}\n${boxes}`;
    if (!force && text === this.#written) return;
    this.#written = text;
    this.#selected = -1;
    if (this.view.size) {
      try {
        this.#history.reset(parseMarks(points, boxes, this.view.size));
        this.error = "";
      } catch (error) {
        this.#history.reset([]);
        this.error = error.message;
      }
    }
    this.#render();
  }

  /** Show a picture; see PickerView.show. */
  show(picture) {
    this.view.show(picture);
    this.#render();
  }

  destroy() {
    this.#listeners.abort();
    this.view.destroy();
  }

  get marks() {
    return this.#history.marks;
  }

  // ---- edits ----

  #write() {
    const texts = formatMarks(this.marks, this.view.size);
    this.#written = `${texts.points}\n${texts.boxes}`;
    this.error = "";
    this.store.write(texts);
    this.view.setStale(true);
    this.#render();
  }

  #commit(marks, selected = -1) {
    if (this.#locked()) return;
    this.#history.push(marks);
    this.#selected = selected;
    this.#write();
  }

  #locked() {
    return !this.view.size || this.store.read().locked;
  }

  add(mark) {
    this.#commit([...this.marks, mark], mark.kind === "box" ? this.marks.length : -1);
  }

  remove(index = this.#selected) {
    if (index < 0) index = this.marks.length - 1;
    if (index >= 0) this.#commit(this.marks.filter((_, i) => i !== index));
  }

  clear() {
    if (this.marks.length) this.#commit([]);
  }

  undo() {
    if (!this.#locked() && this.#history.undo()) this.#afterStep();
  }

  redo() {
    if (!this.#locked() && this.#history.redo()) this.#afterStep();
  }

  #afterStep() {
    this.#selected = -1;
    this.#write();
  }

  // ---- input ----

  #listen() {
    const { viewport, buttons } = this.view;
    const on = (target, type, handler, options = {}) =>
      target.addEventListener(type, handler, { signal: this.#listeners.signal, ...options });
    // The canvas below must not see what happens here: it would drag, pan or delete the node.
    for (const type of ["pointerdown", "pointermove", "pointerup", "mousedown", "mouseup", "click", "dblclick", "contextmenu"])
      on(this.element, type, (event) => event.stopPropagation());
    on(viewport, "pointerdown", (event) => this.#press(event));
    on(viewport, "pointermove", (event) => this.#move(event));
    on(viewport, "pointerup", (event) => this.#release(event));
    on(viewport, "pointercancel", () => this.#cancel());
    on(viewport, "lostpointercapture", () => this.#drag && this.#cancel());
    on(viewport, "contextmenu", (event) => event.preventDefault());
    on(viewport, "dblclick", (event) => event.preventDefault());
    on(viewport, "wheel", (event) => this.#wheel(event), { passive: false });
    on(viewport, "keydown", (event) => this.#key(event));
    on(viewport, "blur", () => this.#setCursor(null));
    on(buttons.undo, "click", () => this.undo());
    on(buttons.redo, "click", () => this.redo());
    on(buttons.remove, "click", () => this.remove());
    on(buttons.clear, "click", () => this.clear());
    on(buttons.fit, "click", () => this.view.fit());
    on(buttons.mask, "click", () => this.view.toggleMask());
  }

  #press(event) {
    this.view.viewport.focus({ preventScroll: true });
    if (!this.view.size || this.#drag) return;
    const at = this.view.toImage(event);
    const pan = event.button === 1 || (event.button === 0 && (event.ctrlKey || event.metaKey));
    const index = pan ? -1 : this.#hit(at);
    const inside = at.x >= 0 && at.y >= 0 && at.x < this.view.size[0] && at.y < this.view.size[1];
    if (!pan && ((index < 0 && !inside) || event.button > 2)) return;
    event.preventDefault();
    this.view.viewport.setPointerCapture(event.pointerId);
    const kind = pan ? "pan" : index >= 0 ? "mark" : "new";
    this.#drag = { kind, index, from: at, now: at, start: [event.clientX, event.clientY], last: [event.clientX, event.clientY] };
    this.#drag.negative = event.button === 2 || event.shiftKey;
    this.#drag.button = event.button;
    if (index >= 0) this.#selected = index;
    this.#render();
  }

  #move(event) {
    const drag = this.#drag;
    if (!drag) return;
    drag.moved ||= Math.hypot(event.clientX - drag.start[0], event.clientY - drag.start[1]) > DRAG;
    if (drag.kind === "pan") this.view.pan(event.clientX - drag.last[0], event.clientY - drag.last[1]);
    drag.last = [event.clientX, event.clientY];
    drag.now = this.view.toImage(event);
    if (drag.moved) this.#render();
  }

  #release(event) {
    const drag = this.#drag;
    if (!drag) return;
    this.#drag = null;
    this.view.viewport.releasePointerCapture?.(event.pointerId);
    if (drag.kind === "mark" && drag.moved && drag.button === 0) {
      const moved = this.#shifted(drag);
      this.#commit(this.marks.map((mark, i) => (i === drag.index ? moved : mark)), drag.index);
    } else if (drag.kind === "mark" && !drag.moved && event.altKey) {
      this.remove(drag.index);
    } else if (drag.kind === "new" && !drag.moved) {
      this.add({ kind: drag.negative ? "negative" : "positive", ...this.view.pixel(drag.from) });
    } else if (drag.kind === "new" && drag.button === 0) {
      this.#addBox(drag.from, drag.now);
    }
    this.#render();
  }

  #cancel() {
    this.#drag = null;
    this.#corner = null;
    this.#render();
  }

  #addBox(from, to) {
    const box = this.view.box(from, to);
    if (box.width >= 1 && box.height >= 1) this.add(box);
  }

  #shifted({ index, from, now }) {
    const mark = this.marks[index];
    const [width, height] = this.view.size;
    const limit = (value, most) => Math.round(Math.min(Math.max(0, value), most));
    return {
      ...mark,
      x: limit(mark.x + now.x - from.x, width - (mark.width ?? 1)),
      y: limit(mark.y + now.y - from.y, height - (mark.height ?? 1)),
    };
  }

  /** The mark under an image position: points before boxes' edges, later ones first. */
  #hit({ x, y }) {
    const reach = HIT / this.view.screenScale();
    const onPoint = (mark) => mark.kind !== "box" && Math.hypot(mark.x + 0.5 - x, mark.y + 0.5 - y) <= reach;
    const onEdge = (mark) => {
      if (mark.kind !== "box") return false;
      const dx = Math.min(Math.abs(x - mark.x), Math.abs(x - mark.x - mark.width));
      const dy = Math.min(Math.abs(y - mark.y), Math.abs(y - mark.y - mark.height));
      const beside = (value, low, length) => value >= low - reach && value <= low + length + reach;
      const within = beside(x, mark.x, mark.width) && beside(y, mark.y, mark.height);
      return within && Math.min(dx, dy) <= reach / 2;
    };
    const point = this.marks.findLastIndex(onPoint);
    return point >= 0 ? point : this.marks.findLastIndex(onEdge);
  }

  #wheel(event) {
    // Unfocused, the wheel belongs to the graph's canvas, as everywhere on it.
    if (document.activeElement !== this.view.viewport) return;
    event.preventDefault();
    event.stopPropagation();
    this.view.zoomAt(event, Math.exp(-event.deltaY / 400));
  }

  #key(event) {
    const command = event.ctrlKey || event.metaKey;
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const actions = command
      ? { z: () => (event.shiftKey ? this.redo() : this.undo()), y: () => this.redo() }
      : {
          Delete: () => this.remove(),
          Backspace: () => this.remove(),
          Escape: () => this.#escape(),
          Enter: () => this.#atCursor(event.shiftKey ? "negative" : "positive"),
          " ": () => this.#atCursor(event.shiftKey ? "negative" : "positive"),
          n: () => this.#atCursor("negative"),
          b: () => this.#keyboardBox(),
          "[": () => this.#select(-1),
          "]": () => this.#select(1),
          "+": () => this.view.zoom(1.25),
          "=": () => this.view.zoom(1.25),
          "-": () => this.view.zoom(0.8),
          0: () => this.view.fit(),
          ArrowLeft: () => this.#arrow(-1, 0, event),
          ArrowRight: () => this.#arrow(1, 0, event),
          ArrowUp: () => this.#arrow(0, -1, event),
          ArrowDown: () => this.#arrow(0, 1, event),
        };
    const action = actions[name];
    if (!action) return; // Tab and the graph's own shortcuts pass
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  #escape() {
    this.#selected = -1;
    this.#cancel();
  }

  #setCursor(at) {
    this.#cursor = at;
    this.#corner = at && this.#corner;
    this.#render();
  }

  #ensureCursor() {
    if (!this.view.size) return null;
    this.#cursor ??= { x: this.view.size[0] / 2, y: this.view.size[1] / 2 };
    return this.#cursor;
  }

  /** Arrows move the selected mark by a pixel, else the cross by a step; Shift makes either ten times as far. */
  #arrow(dx, dy, event) {
    if (!this.view.size || this.#locked()) return;
    if (this.#selected >= 0) {
      const reach = event.shiftKey ? 10 : 1;
      const now = { x: dx * reach, y: dy * reach };
      const moved = this.#shifted({ index: this.#selected, from: { x: 0, y: 0 }, now });
      this.#commit(this.marks.map((mark, i) => (i === this.#selected ? moved : mark)), this.#selected);
      return;
    }
    const at = this.#ensureCursor();
    const step = (Math.max(...this.view.size) / 100) * (event.shiftKey ? 10 : 1);
    const [width, height] = this.view.size;
    this.#setCursor({
      x: Math.min(Math.max(0, at.x + dx * step), width - 1),
      y: Math.min(Math.max(0, at.y + dy * step), height - 1),
    });
  }

  #atCursor(kind) {
    const at = this.#ensureCursor();
    if (!at) return;
    if (this.#corner) this.#keyboardBox();
    else this.add({ kind, ...this.view.pixel(at) });
  }

  /** The first press fixes a corner at the cross, the second makes the box. */
  #keyboardBox() {
    const at = this.#ensureCursor();
    if (!at) return;
    const corner = this.#corner;
    this.#corner = corner ? null : { ...at };
    if (corner) this.#addBox(corner, at);
    this.#render();
  }

  #select(step) {
    const count = this.marks.length;
    if (count) this.#selected = this.#selected < 0 ? (step > 0 ? 0 : count - 1) : (this.#selected + step + count) % count;
    this.#render();
  }

  // ---- drawing ----

  #render() {
    const drag = this.#drag;
    let marks = this.marks;
    let draft = null;
    if (drag?.moved && drag.kind === "mark" && drag.button === 0)
      marks = marks.map((mark, i) => (i === drag.index ? this.#shifted(drag) : mark));
    if (drag?.moved && drag.kind === "new" && drag.button === 0) draft = this.view.box(drag.from, drag.now);
    if (this.#corner && this.#cursor) draft = this.view.box(this.#corner, this.#cursor);
    const locked = this.store.read().locked;
    this.view.draw({
      marks,
      draft,
      selected: this.#selected,
      cursor: this.#cursor,
      canUndo: this.#history.canUndo && !locked,
      canRedo: this.#history.canRedo && !locked,
      locked,
      error: this.error,
    });
  }
}
