/**
 * The regions of a picture, with undo and redo.
 *
 * A region is {number, color, prompt, answer, caption, writing, before, dropped}: `answer` is the
 * server's object, null until it comes; `caption` is what is written of it so far; `before` is the
 * region that it has replaced; `dropped` is true once no answer will come. Steps of the history
 * share these objects, so an answer that comes late is there after undo and redo, too.
 */

import { colorOf } from "./colors.js";

const START = { list: [], selected: null };

export class Regions {
  #past = [];
  #now = START;
  #future = [];
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
  }

  get list() {
    return this.#now.list;
  }

  get selected() {
    return this.#now.selected;
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /** Makes a region, which is not in the list yet. */
  make(prompt, number = 1 + Math.max(0, ...this.list.map((region) => region.number))) {
    const empty = { answer: null, caption: "", writing: true, before: null, dropped: false };
    return { number, color: colorOf(number), prompt, ...empty };
  }

  add(region) {
    this.#step({ list: [...this.list, region], selected: region });
  }

  /** Puts a region in the place of another; the earlier one comes back with undo. */
  replace(before, after) {
    after.before = before;
    this.#step({
      list: this.list.map((each) => (each === before ? after : each)),
      selected: after,
    });
  }

  replaceAll(list) {
    this.#step({ list, selected: null });
  }

  remove(region) {
    const list = this.list.filter((each) => each !== region);
    this.#step({ list, selected: this.selected === region ? null : this.selected });
  }

  select(region) {
    this.#now = { ...this.#now, selected: region };
    this.#onChange();
  }

  undo() {
    if (!this.canUndo) return;
    this.#future.push(this.#now);
    this.#now = this.#past.pop();
    this.#onChange();
  }

  redo() {
    if (!this.canRedo) return;
    this.#past.push(this.#now);
    this.#now = this.#future.pop();
    this.#onChange();
  }

  /** Forgets everything, the history included: there is a new picture. */
  reset() {
    this.#past = [];
    this.#future = [];
    this.#now = START;
    this.#onChange();
  }

  /** Takes a region that got no answer out of every step, as if it had not been asked for. */
  drop(region) {
    region.dropped = true;
    const back = lastNotDropped(region.before);
    const without = ({ list, selected }) => ({
      list: list.flatMap((each) => (each === region ? (back ?? []) : each)),
      selected: selected === region ? back : selected,
    });
    this.#now = without(this.#now);
    this.#past = changing(this.#past.map(without), this.#now);
    this.#future = changing(this.#future.map(without), this.#now);
    this.#onChange();
  }

  #step(next) {
    this.#past.push(this.#now);
    this.#now = next;
    this.#future = [];
    this.#onChange();
  }
}

/** The region itself, or the nearest of those that it has replaced; null if all were dropped. */
function lastNotDropped(region) {
  while (region?.dropped) region = region.before;
  return region;
}

/** The steps, of which the last is next to `now`, without those that show the same as the next. */
function changing(steps, now) {
  return steps.filter((step, at) => !sameList(step, steps[at + 1] ?? now));
}

function sameList(one, other) {
  return (
    one.list.length === other.list.length && one.list.every((each, at) => each === other.list[at])
  );
}

/** A region's prompt with one more point, label 1 inside, 0 outside; null while it must wait. */
export function refined({ prompt, answer }, [x, y], label) {
  const point = [x, y, label];
  if (!prompt.sketch) return { ...prompt, points: [...(prompt.points ?? []), point] };
  return answer && { points: [...answer.points, point] }; // the points that the stroke became
}

export function nameOf(region) {
  return region.answer?.concepts?.[0]?.name ?? "region";
}

/** The probability of the name as text, such as "98%"; empty if there is none. */
export function probabilityOf(region) {
  const probability = region.answer?.concepts?.[0]?.probability;
  return probability == null ? "" : `${Math.round(100 * probability)}%`;
}
