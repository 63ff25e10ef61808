// Marks on an image: points and boxes in its pixels, their text in the node's widgets, and an edit history.

/**
 * @typedef {{kind: "positive" | "negative", x: number, y: number}} PointMark
 * @typedef {{kind: "box", x: number, y: number, width: number, height: number}} BoxMark
 * @typedef {PointMark | BoxMark} Mark
 */

const NEGATIVE = new Set([0, -1, false, "0", "-1", "-", "negative", "neg", "background"]);
const HISTORY = 200;

/** The text of the `points` and `boxes` widgets; empty where there is nothing. */
export function formatMarks(marks, size) {
  const points = (kind) => marks.filter((mark) => mark.kind === kind).map(({ x, y }) => ({ x, y }));
  const positive = points("positive");
  const negative = points("negative");
  const boxes = marks
    .filter((mark) => mark.kind === "box")
    .map(({ x, y, width, height }) => ({ x, y, width, height }));
  return {
    points: positive.length + negative.length ? JSON.stringify({ positive, negative, size }) : "",
    boxes: boxes.length ? JSON.stringify({ boxes, size }) : "",
  };
}

/** Marks of both texts in pixels of an image of `size` [width, height]. Throws an Error that says what is wrong. */
export function parseMarks(points, boxes, size) {
  return [...parsePoints(decode(points, "points"), size, 1), ...parseBoxes(decode(boxes, "boxes"), size)];
}

function decode(text, name) {
  if (!text?.trim()) return [];
  try {
    return JSON.parse(text) ?? [];
  } catch {
    throw new Error(`${name}: no valid JSON`);
  }
}

function parsePoints(value, size, label) {
  if (!Array.isArray(value) && typeof value === "object" && !("x" in value)) {
    const ratio = scale(value.size, size);
    const list = value.points
      ? parsePoints(value.points.map((point, i) => withLabel(point, value.labels?.[i])), size, label)
      : [...parsePoints(value.positive ?? [], size, 1), ...parsePoints(value.negative ?? [], size, 0)];
    return list.map((mark) => ({ ...mark, x: mark.x * ratio[0], y: mark.y * ratio[1] }));
  }
  if (isPoint(value)) value = [value];
  if (!Array.isArray(value)) throw new Error("points: expected a list");
  if (value.length === 2 && value.every((part) => Array.isArray(part) && !isPoint(part) && part.every(isPoint)))
    return parsePoints({ positive: value[0], negative: value[1] }, size, label);
  return value.map((item) => {
    if (!isPoint(item)) throw new Error(`points: ${JSON.stringify(item)} is no point`);
    const [x, y, own] = Array.isArray(item) ? item : [item.x, item.y, item.label];
    return { kind: NEGATIVE.has(own ?? label) ? "negative" : "positive", x, y };
  });
}

function parseBoxes(value, size) {
  let ratio = [1, 1];
  if (!Array.isArray(value) && value?.boxes) {
    ratio = scale(value.size, size);
    value = value.boxes;
  }
  if (!Array.isArray(value) || isNumbers(value, 4)) value = [value];
  if (value.length && value.every((item) => Array.isArray(item) && !isNumbers(item, 4))) value = value[0]; // first image's
  return value.map((item) => {
    const [x1, y1, x2, y2] = corners(item);
    return {
      kind: "box",
      x: Math.min(x1, x2) * ratio[0],
      y: Math.min(y1, y2) * ratio[1],
      width: Math.abs(x2 - x1) * ratio[0],
      height: Math.abs(y2 - y1) * ratio[1],
    };
  });
}

function corners(item) {
  if (isNumbers(item, 4)) return item;
  const pick = (keys) => keys.map((key) => item?.[key]);
  const [x, y, width, height] = pick(["x", "y", "width", "height"]);
  for (const found of [
    [x, y, x + width, y + height],
    pick(["x1", "y1", "x2", "y2"]),
    pick(["startX", "startY", "endX", "endY"]),
    pick(["xmin", "ymin", "xmax", "ymax"]),
  ])
    if (isNumbers(found, 4)) return found;
  throw new Error(`boxes: ${JSON.stringify(item)} is no box`);
}

const isNumbers = (value, count) => Array.isArray(value) && value.length === count && value.every(Number.isFinite);

function isPoint(value) {
  if (Array.isArray(value)) return isNumbers(value, 2) || isNumbers(value, 3);
  return Number.isFinite(value?.x) && Number.isFinite(value?.y);
}

function withLabel(point, label) {
  const [x, y] = Array.isArray(point) ? point : [point.x, point.y];
  return { x, y, label };
}

const scale = (from, to) => (from && to ? [to[0] / from[0], to[1] / from[1]] : [1, 1]);

/** The image size [width, height] that a text says its marks belong to, null where none does. */
export function sizeOfTexts(...texts) {
  for (const text of texts) {
    try {
      const { size } = JSON.parse(text) ?? {};
      if (isNumbers(size, 2) && size.every((length) => length > 0)) return size;
    } catch {
      // typed by hand and not finished
    }
  }
  return null;
}

/**
 * A box with one edge or corner moved by dx, dy; its sides may cross. `grip` has "n" or "s" and "w" or "e".
 * @returns {{x1: number, y1: number, x2: number, y2: number}}
 */
export function resized({ x, y, width, height }, grip, dx, dy) {
  return {
    x1: x + (grip.includes("w") ? dx : 0),
    y1: y + (grip.includes("n") ? dy : 0),
    x2: x + width + (grip.includes("e") ? dx : 0),
    y2: y + height + (grip.includes("s") ? dy : 0),
  };
}

/** Undo and redo over immutable lists of marks. */
export class History {
  #past = [];
  #future = [];

  constructor(marks = []) {
    this.marks = marks;
  }

  /** Start over, as when the texts were changed from outside. */
  reset(marks) {
    this.#past = [];
    this.#future = [];
    this.marks = marks;
  }

  push(marks) {
    this.#past.push(this.marks);
    if (this.#past.length > HISTORY) this.#past.shift();
    this.#future = [];
    this.marks = marks;
  }

  undo() {
    return this.#step(this.#past, this.#future);
  }

  redo() {
    return this.#step(this.#future, this.#past);
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  #step(from, to) {
    if (!from.length) return false;
    to.push(this.marks);
    this.marks = from.pop();
    return true;
  }
}
