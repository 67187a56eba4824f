/** What the user is drawing: one stroke of a tool, by pointer or by keyboard, becomes a prompt. */

const SMALLEST_BOX = 2; // pixels of the picture, each side

export class Pen {
  #stroke = null;
  #kind = null;

  /** True between down and up. */
  get isDown() {
    return this.#stroke !== null;
  }

  /** Begins a stroke of the tool "point", "box" or "sketch" at [x, y], pixels of the picture. */
  down(kind, place) {
    this.#kind = kind;
    this.#stroke = [place];
  }

  move(place) {
    if (this.#kind === "sketch") this.#stroke.push(place);
    else if (this.#kind === "box") this.#stroke[1] = place;
  }

  cancel() {
    this.#stroke = null;
  }

  /** What to draw of the stroke: {box} or {sketch}, or null. */
  get draft() {
    return this.#stroke && this.#kind !== "point" ? this.#prompt() : null;
  }

  /** Ends the stroke; returns {point}, {box} or {sketch}, or null if the box has no area. */
  up() {
    const prompt = this.#prompt();
    this.#stroke = null;
    return prompt;
  }

  #prompt() {
    const [start, end = start] = this.#stroke;
    if (this.#kind === "sketch") return { sketch: this.#stroke };
    if (this.#kind === "point") return { point: start };
    const [x0, x1] = [start[0], end[0]].sort((one, other) => one - other);
    const [y0, y1] = [start[1], end[1]].sort((one, other) => one - other);
    return Math.min(x1 - x0, y1 - y0) < SMALLEST_BOX ? null : { box: [x0, y0, x1, y1] };
  }
}

/** What a point is for: "new", "inside" or "outside"; keys overrule the aim that is set. */
export function aimOf(event, aim) {
  if (event.shiftKey) return "outside";
  return event.altKey ? "inside" : aim;
}
