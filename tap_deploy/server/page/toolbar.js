/** The toolbar: the tool, what a point is for, and the line that says what to do. */

import { nameOf } from "./regions.js";

const AIMS = ["inside", "outside"]; // besides "new"

export class Toolbar {
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    for (const radio of radios()) radio.addEventListener("change", onChange);
  }

  /** "point", "box" or "sketch". */
  get tool() {
    return checked("tool");
  }

  /** What a point is for: "new", "inside" or "outside". */
  get aim() {
    return checked("aim");
  }

  choose(tool) {
    radio(tool).checked = true;
    this.#onChange();
  }

  /** Allows what is possible now. `searches`: everything is being searched for. */
  show({ picture, regions, searches }) {
    const refines = regions.selected !== null && this.tool === "point";
    if (!refines) radio("new").checked = true;
    for (const aim of AIMS) radio(aim).disabled = !refines;
    part("hint").textContent = picture ? this.#hint(regions.selected) : "";
    part("undo").disabled = !regions.canUndo;
    part("redo").disabled = !regions.canRedo;
    part("clear").disabled = regions.list.length === 0;
    part("everything").disabled = picture === null;
    part("everything").querySelector("span").textContent = searches ? "Stop" : "Everything";
  }

  #hint(selected) {
    const touch = matchMedia("(pointer: coarse)").matches;
    const click = touch ? "Tap" : "Click";
    if (this.tool === "box") return "Drag a box around an object.";
    if (this.tool === "sketch") return "Draw a line over an object.";
    if (!selected) return `${click} on an object.`;
    const name = `region ${selected.number}, ${nameOf(selected)}`;
    if (this.aim === "inside") return `${click} on what belongs to ${name}.`;
    if (this.aim === "outside") return `${click} on what does not belong to ${name}.`;
    return touch
      ? `Tap on an object. + Add and − Leave out change ${name}.`
      : `Click on an object. Alt-click adds to ${name}, Shift-click leaves out.`;
  }
}

function part(id) {
  return document.getElementById(id);
}

function radios() {
  return document.querySelectorAll("input[type=radio]");
}

function radio(value) {
  return [...radios()].find((each) => each.value === value);
}

function checked(name) {
  return [...radios()].find((each) => each.name === name && each.checked).value;
}
