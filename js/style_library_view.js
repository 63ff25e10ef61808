// The gallery of Style Library: pictures with names, by mouse and by keyboard; knows nothing of graphs and servers.
import { say } from "./texts.js";

const STEP = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Gallery {
  #styles = [];
  #shown = [];
  #library = null;
  #hand = null; // the model in hand, known after a run
  #value = "";
  #active = 0;
  #asked = null; // the style whose deletion is to be confirmed
  #busy = false;
  #listeners = new AbortController();

  /** actions: choose(style), remove(style), limit(megabytes), refresh(), picture(style) -> address. */
  constructor(actions) {
    this.actions = actions;
    this.element = make("div", "pastiche-library");
    this.own = make("input", "", { type: "checkbox" });
    this.ownLabel = make("label", "pastiche-library-own");
    this.ownLabel.append(this.own, say("only this model"));
    this.refresh = make("button", "", { type: "button", textContent: "⟳", title: say("Refresh the list") });
    this.refresh.setAttribute("aria-label", this.refresh.title);
    this.total = make("span", "pastiche-library-total");
    this.limit = make("input", "pastiche-library-limit", { type: "number", min: 0, step: 100 });
    this.limit.title = say("What saved styles may take altogether; empty is no limit. Saving beyond it is refused, nothing is deleted by itself.");
    const limit = make("label", "pastiche-library-own");
    limit.append(say("Limit (MB)"), this.limit);
    const bar = make("div", "pastiche-library-bar");
    bar.append(this.refresh, this.ownLabel, make("span", "pastiche-library-gap"), this.total, limit);

    this.grid = make("div", "pastiche-library-grid", { tabIndex: 0 });
    this.grid.setAttribute("role", "listbox");
    this.grid.setAttribute("aria-label", say("Styles"));
    this.grid.dataset.captureWheel = "true";

    this.status = make("div", "pastiche-library-status");
    this.status.setAttribute("role", "status");
    this.remove = make("button", "", { type: "button", textContent: say("Delete") });
    this.remove.dataset.action = "delete";
    this.yes = make("button", "pastiche-library-yes", { type: "button", textContent: say("Delete for good"), hidden: true });
    this.yes.dataset.action = "confirm";
    this.no = make("button", "", { type: "button", textContent: say("Keep"), hidden: true });
    this.no.dataset.action = "keep";
    const foot = make("div", "pastiche-library-bar");
    foot.append(this.status, this.remove, this.yes, this.no);
    this.element.append(bar, this.grid, foot);
    this.#listen();
  }

  /** library: what fetchLibrary gives. */
  show(library) {
    this.#library = library;
    this.#styles = library.styles;
    this.#draw();
  }

  select(value) {
    if (value === this.#value) return;
    this.#value = value;
    this.#active = Math.max(0, this.#shown.findIndex((style) => style.key === value));
    this.#mark(true);
  }

  /** hand: {weights, model, family} of the connected MODEL, or null. */
  setModel(hand) {
    this.#hand = hand;
    this.#draw();
  }

  /** A line below the pictures. */
  tell(text, trouble = false) {
    this.status.textContent = text;
    this.status.classList.toggle("pastiche-library-trouble", trouble);
  }

  set busy(busy) {
    this.#busy = busy;
    this.#buttons();
  }

  destroy() {
    this.#listeners.abort();
  }

  // ---- drawing ----

  #draw() {
    if (!this.#library) return;
    const { total, limit } = this.#library;
    this.total.textContent = say("{size} saved", { size: readable(total) });
    this.total.classList.toggle("pastiche-library-trouble", limit > 0 && total > limit);
    if (document.activeElement !== this.limit) this.limit.value = limit ? Math.round(limit / 1e6) : "";
    const model = this.#hand && (this.#hand.model || this.#hand.family);
    this.own.disabled = !this.#hand;
    this.ownLabel.title = model ? say("The model of the last run: {model}", { model }) : say("The model in hand is known after a run.");
    this.#shown = this.#styles.filter((style) => !this.own.checked || this.own.disabled || !unfit(style, this.#hand));
    this.grid.replaceChildren(...this.#shown.map((style, i) => this.#tile(style, i)));
    this.#active = Math.min(Math.max(0, this.#shown.findIndex((style) => style.key === this.#value)), Math.max(0, this.#shown.length - 1));
    this.#mark(true);
  }

  #tile(style, number) {
    const tile = make("div", "pastiche-library-tile", { id: `pastiche-style-${instance(this)}-${number}` });
    const reason = style.problem || unfit(style, this.#hand);
    tile.setAttribute("role", "option");
    tile.dataset.key = style.key;
    tile.title = described(style, reason);
    tile.classList.toggle("pastiche-library-unfit", Boolean(reason));
    const url = this.actions.picture(style);
    const picture = url ? make("img", "", { src: url, alt: "", draggable: false, loading: "lazy" }) : make("div", "pastiche-library-none", { textContent: style.problem ? "⚠" : "?" });
    const name = make("div", "pastiche-library-name", { textContent: style.title });
    const made = make("div", "pastiche-library-model", { textContent: style.problem ? say("cannot be read") : style.kind === "ready" ? say("any model") : style.model || style.family });
    tile.append(picture, name, made);
    return tile;
  }

  #mark(scroll = false) {
    [...this.grid.children].forEach((tile, i) => {
      tile.setAttribute("aria-selected", String(tile.dataset.key === this.#value));
      tile.classList.toggle("pastiche-library-active", i === this.#active);
      if (i === this.#active) {
        this.grid.setAttribute("aria-activedescendant", tile.id);
        if (scroll) this.grid.scrollTop += outside(tile, this.grid);
      }
    });
    this.#ask(null);
  }

  #buttons() {
    const style = this.#shown[this.#active];
    const asking = this.#asked !== null;
    this.remove.hidden = asking || !style || style.kind === "ready";
    this.yes.hidden = this.no.hidden = !asking;
    for (const button of [this.remove, this.yes, this.no, this.refresh, this.limit]) button.disabled = this.#busy;
  }

  // ---- input ----

  #listen() {
    const on = (target, type, handler, options = {}) => target.addEventListener(type, handler, { signal: this.#listeners.signal, ...options });
    // The canvas below must not see what happens here: it would drag, pan or delete the node.
    for (const type of ["pointerdown", "pointermove", "pointerup", "mousedown", "mouseup", "click", "dblclick", "contextmenu"])
      on(this.element, type, (event) => event.stopPropagation());
    on(this.element, "keydown", (event) => event.target !== this.grid && event.stopPropagation());
    on(this.grid, "click", (event) => {
      const tile = event.target.closest("[role=option]");
      if (!tile) return;
      this.grid.focus({ preventScroll: true });
      this.#active = [...this.grid.children].indexOf(tile);
      this.#choose();
    });
    on(this.grid, "keydown", (event) => this.#key(event));
    on(this.grid, "wheel", (event) => document.activeElement === this.grid && event.stopPropagation()); // else the graph zooms
    on(this.own, "change", () => this.#draw());
    on(this.refresh, "click", () => this.actions.refresh());
    on(this.limit, "change", () => this.actions.limit(Math.max(0, Math.round(Number(this.limit.value) || 0))));
    on(this.remove, "click", () => this.#ask(this.#shown[this.#active]));
    on(this.no, "click", () => this.#ask(null, true));
    on(this.yes, "click", () => {
      const style = this.#asked;
      this.#ask(null, true);
      if (style) this.actions.remove(style);
    });
    for (const button of [this.yes, this.no]) on(button, "keydown", (event) => event.key === "Escape" && this.#ask(null, true));
  }

  #key(event) {
    const step = STEP[event.key];
    const actions = {
      Enter: () => this.#choose(),
      " ": () => this.#choose(),
      Delete: () => this.#ask(this.#shown[this.#active]),
      Home: () => this.#go(0),
      End: () => this.#go(this.#shown.length - 1),
    };
    if ((!step && !actions[event.key]) || event.ctrlKey || event.metaKey || event.altKey) return; // the graph's own shortcuts pass
    event.preventDefault();
    event.stopPropagation();
    if (step) this.#go(this.#active + step[0] + step[1] * this.#columns());
    else actions[event.key]();
  }

  #columns() {
    const tiles = [...this.grid.children];
    return Math.max(1, tiles.findIndex((tile) => tile.offsetTop > tiles[0].offsetTop) === -1 ? tiles.length : tiles.findIndex((tile) => tile.offsetTop > tiles[0].offsetTop));
  }

  #go(number) {
    if (number < 0 || number >= this.#shown.length) return;
    this.#active = number;
    this.#mark(true);
  }

  #choose() {
    const style = this.#shown[this.#active];
    if (!style) return;
    const reason = style.problem || unfit(style, this.#hand);
    this.tell(reason ? `${style.title}: ${reason}` : "", Boolean(reason));
    if (!style.problem) {
      this.#value = style.key;
      this.actions.choose(style);
    }
    this.#mark();
  }

  #ask(style, back = false) {
    const asking = style && style.kind !== "ready" && !this.#busy;
    if (this.#asked && !asking) this.tell("");
    this.#asked = asking ? style : null;
    this.#buttons();
    if (asking) {
      this.tell(say("Delete {name} ({size})? It cannot be brought back.", { name: style.title, size: readable(style.size) }), true);
      this.no.focus();
    } else if (back) this.grid.focus({ preventScroll: true });
  }
}

/** Why a style does not fit the model in hand, "" where it does or none is known. As nodes/host/features/ decides it. */
function unfit(style, hand) {
  if (style.problem) return style.problem;
  if (!hand || style.kind === "ready" || style.weights === hand.weights || (style.kind === "lora" && style.family === hand.family)) return "";
  return say("made with {theirs}; the model of the last run is {ours}", { theirs: model(style), ours: model(hand) });
}

const model = ({ model: name, family, weights }) => [name, family && `(${family})`].filter(Boolean).join(" ") || weights;

function described(style, reason) {
  const settings = Object.entries(style.settings ?? {}).map(([name, value]) => `${name}: ${value}`);
  const file = style.kind === "ready" ? [] : [`${style.kind}, ${readable(style.size)}, ${new Date(style.modified * 1000).toLocaleString()}`, style.weights ? model(style) : ""];
  return [style.title, reason, ...file, ...settings, style.notes].filter(Boolean).join("\n");
}

function readable(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; bytes >= 999.5 && unit < units.length - 1; unit++) bytes /= 1000;
  return `${unit ? bytes.toPrecision(3) : bytes} ${units[unit]}`;
}

function outside(tile, grid) {
  const above = tile.offsetTop - grid.offsetTop - grid.scrollTop;
  const below = above + tile.offsetHeight - grid.clientHeight;
  return above < 0 ? above : below > 0 ? below : 0;
}

const instances = new WeakMap();
let count = 0;
function instance(gallery) {
  if (!instances.has(gallery)) instances.set(gallery, ++count);
  return instances.get(gallery);
}

function make(tag, className = "", properties = {}) {
  return Object.assign(document.createElement(tag), { className, ...properties });
}
