/** The keyboard on the picture: a crosshair that draws with a pen. */

import { aimOf } from "./pen.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 0.01; // of the longer side
const LARGE_STEP = 0.1;

export class Crosshair {
  /** [x, y] in pixels of the picture; null while the keyboard is not used. */
  place = null;
  #options;

  /** `options` as of drawByPointer, and onPlace([x, y]) when the crosshair has moved. */
  constructor(options) {
    this.#options = options;
    options.frame.addEventListener("keydown", (event) => this.#key(event));
    options.frame.addEventListener("pointerdown", () => this.hide());
  }

  hide() {
    this.place = null;
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey) return;
    if (ARROWS[event.key]) this.#moveBy(ARROWS[event.key], event.shiftKey ? LARGE_STEP : STEP);
    else if (event.key === "Enter") this.#press(event);
    else return;
    event.preventDefault();
    this.#options.onMove();
  }

  #moveBy([dx, dy], share) {
    const { size, pen } = this.#options;
    const limits = size();
    const step = Math.max(1, Math.round(share * Math.max(...limits)));
    const [x, y] = this.#start();
    this.place = [x + dx * step, y + dy * step].map((value, axis) =>
      Math.min(limits[axis], Math.max(0, value)),
    );
    if (pen.isDown) pen.move(this.place);
    this.#options.onPlace(this.place);
  }

  #start() {
    return this.place ?? this.#options.size().map((side) => Math.round(side / 2));
  }

  /** A point at once; a box or sketch begins with the first Enter and ends with the second. */
  #press(event) {
    const { pen, tool, aim, onPrompt } = this.#options;
    this.place = this.#start();
    if (!pen.isDown) {
      pen.down(tool(), this.place);
      if (tool() !== "point") return;
    }
    onPrompt(pen.up(), aimOf(event, aim()));
  }
}
