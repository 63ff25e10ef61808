// The objects of the last run: which one lies under the pointer, and its shape as a picture.

export class ObjectMap {
  #url = "";
  #numbers = null; // of each pixel of the map, 0 for none
  #size = [0, 0];
  #shown = 0;

  constructor() {
    this.canvas = document.createElement("canvas");
    this.canvas.className = "pastiche-picker-object";
    this.canvas.hidden = true;
  }

  /** Read the map at `url` (red + 256 green is an object's number), or forget it. */
  load(url) {
    if (url === this.#url) return;
    this.#url = url;
    this.#numbers = null;
    this.highlight(0);
    if (!url) return;
    const image = new Image();
    image.onload = () => {
      if (this.#url !== url) return;
      const { naturalWidth: width, naturalHeight: height } = image;
      const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const { data } = context.getImageData(0, 0, width, height);
      this.#numbers = Uint16Array.from({ length: width * height }, (_, i) => data[4 * i] + 256 * data[4 * i + 1]);
      this.#size = [width, height];
      Object.assign(this.canvas, { width, height });
    };
    image.src = url;
  }

  /** The object at a position in 0..1 of width and height; 0 for none. */
  at(across, down) {
    if (!this.#numbers || across < 0 || down < 0 || across >= 1 || down >= 1) return 0;
    const [width, height] = this.#size;
    return this.#numbers[Math.floor(down * height) * width + Math.floor(across * width)];
  }

  /** Show the shape of an object; 0 shows none. */
  highlight(number) {
    if (number === this.#shown) return;
    this.#shown = number;
    this.canvas.hidden = !number;
    this.canvas.dataset.object = number;
    if (!number) return;
    const context = this.canvas.getContext("2d");
    const picture = context.createImageData(...this.#size);
    const pixels = new Uint32Array(picture.data.buffer);
    const colour = 0x734ad5ff; // ABGR: the yellow of a selection, see-through
    this.#numbers.forEach((own, i) => own === number && (pixels[i] = colour));
    context.putImageData(picture, 0, 0);
  }
}
