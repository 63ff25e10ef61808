// The picker of FastSAM Prompt: shows the connected image and edits points and boxes on it.
//
// The node's `points` and `boxes` texts are the only state; everything here can be rebuilt from them.
import { formatMarks, History, parseMarks, resized } from "./fastsam_marks.js";
import { PickerView } from "./fastsam_view.js";

const DRAG = 4; // screen pixels that make a press a drag
const HIT = 9; // screen pixels around a mark that count as on it
const CURSORS = { n: "ns-resize", s: "ns-resize", w: "ew-resize", e: "ew-resize", nw: "nwse-resize", se: "nwse-resize", ne: "nesw-resize", sw: "nesw-resize" };

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
    on(buttons.large, "click", () => this.view.toggleLarge());
    on(viewport, "pointerleave", () => this.view.hover(null));
  }

  #press(event) {
    this.view.viewport.focus({ preventScroll: true });
    if (!this.view.size || this.#drag) return;
    const at = this.view.toImage(event);
    const pan = event.button === 1 || (event.button === 0 && (event.ctrlKey || event.metaKey));
    const { index, grip } = pan ? { index: -1 } : this.#hit(at);
    const inside = at.x >= 0 && at.y >= 0 && at.x < this.view.size[0] && at.y < this.view.size[1];
    if (!pan && ((index < 0 && !inside) || event.button > 2)) return;
    event.preventDefault();
    this.view.viewport.setPointerCapture(event.pointerId);
    const kind = pan ? "pan" : index >= 0 ? "mark" : "new";
    this.view.hover(null);
    this.#drag = { kind, index, grip, from: at, now: at, start: [event.clientX, event.clientY], last: [event.clientX, event.clientY] };
    this.#drag.negative = event.button === 2 || event.shiftKey;
    this.#drag.button = event.button;
    if (index >= 0) this.#selected = index;
    this.#render();
  }

  #move(event) {
    const drag = this.#drag;
    if (!drag) return this.#hover(event);
    drag.moved ||= Math.hypot(event.clientX - drag.start[0], event.clientY - drag.start[1]) > DRAG;
    if (drag.kind === "pan") this.view.pan(event.clientX - drag.last[0], event.clientY - drag.last[1]);
    drag.last = [event.clientX, event.clientY];
    drag.now = this.view.toImage(event);
    if (drag.moved) this.#render();
  }

  /** What a press here would do: the pointer over marks, elsewhere the object that a click would take. */
  #hover(event) {
    if (!this.view.size) return;
    const at = this.view.toImage(event);
    const { index, grip } = this.#locked() ? { index: -1 } : this.#hit(at);
    this.view.viewport.style.cursor = index < 0 ? "" : !grip || grip === "move" ? "move" : CURSORS[grip];
    this.view.hover(index < 0 ? at : null);
  }

  #release(event) {
    const drag = this.#drag;
    if (!drag) return;
    this.#drag = null;
    this.view.viewport.releasePointerCapture?.(event.pointerId);
    if (drag.kind === "mark" && drag.moved && drag.button === 0) {
      const moved = this.#dragged(drag);
      if (moved) this.#commit(this.marks.map((mark, i) => (i === drag.index ? moved : mark)), drag.index);
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

  /** The mark as the drag leaves it: a box by one of its grips, anything else moved. Null for a box without area. */
  #dragged(drag) {
    const { index, grip, from, now } = drag;
    if (!grip || grip === "move") return this.#shifted(drag);
    const { x1, y1, x2, y2 } = resized(this.marks[index], grip, now.x - from.x, now.y - from.y);
    const box = this.view.box({ x: x1, y: y1 }, { x: x2, y: y2 });
    return box.width >= 1 && box.height >= 1 ? box : null;
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

  /**
   * The mark under an image position and, of a box, what of it: {index, grip}; index -1 for none. Points before
   * boxes, later marks first. grip: "n", "se" and the like, or "move" for the middle of the selected box.
   */
  #hit(at) {
    const reach = HIT / this.view.screenScale();
    const onPoint = (mark) => mark.kind !== "box" && Math.hypot(mark.x + 0.5 - at.x, mark.y + 0.5 - at.y) <= reach;
    const point = this.marks.findLastIndex(onPoint);
    if (point >= 0) return { index: point };
    const order = this.marks.map((_, i) => i).reverse();
    order.sort((a, b) => (b === this.#selected) - (a === this.#selected));
    for (const index of order) {
      const grip = this.#grip(index, at, reach);
      if (grip) return { index, grip };
    }
    return { index: -1 };
  }

  #grip(index, { x, y }, reach) {
    const mark = this.marks[index];
    if (mark.kind !== "box") return "";
    const near = (value, edge, share = 1) => Math.abs(value - edge) <= reach * share;
    const [right, bottom] = [mark.x + mark.width, mark.y + mark.height];
    if (index === this.#selected && near(x, mark.x + mark.width / 2) && near(y, mark.y + mark.height / 2)) return "move";
    const within = x >= mark.x - reach && x <= right + reach && y >= mark.y - reach && y <= bottom + reach;
    if (!within) return "";
    const side = (low, high, value, names) => (near(value, high, 0.6) ? names[1] : near(value, low, 0.6) ? names[0] : "");
    return side(mark.y, bottom, y, "ns") + side(mark.x, right, x, "we");
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
          l: () => this.view.toggleLarge(),
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

  /** Lets go of what is held; where nothing is, closes the large view. */
  #escape() {
    const idle = this.#selected < 0 && !this.#drag && !this.#corner;
    if (idle) this.view.closeLarge();
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
      marks = marks.map((mark, i) => (i === drag.index ? (this.#dragged(drag) ?? mark) : mark));
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
