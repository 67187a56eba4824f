/** What the page says: a line of state, a line of error, and what screen readers announce. */

import { nameOf, probabilityOf } from "./regions.js";

const REST = 600; // ms without a step, after which the place of the crosshair is said

export class Notices {
  #status;
  #error;
  #announcement;
  #resting;

  constructor({ status, error, announcement }) {
    this.#status = status;
    this.#error = error;
    this.#announcement = announcement;
    error.querySelector("button").addEventListener("click", () => this.fail(""));
  }

  /** Shows what goes on; an empty text shows nothing. */
  say(text) {
    if (this.#status.textContent !== text) this.#status.textContent = text;
  }

  /** Shows an error until it is dismissed or something else is tried; an empty text hides it. */
  fail(text) {
    this.#error.querySelector("p").textContent = text;
    this.#error.hidden = !text;
  }

  /** Says something to screen readers only. */
  announce(text) {
    this.#announcement.textContent = text;
  }

  /** Says what was found, once it is complete; the captions of many regions would take minutes. */
  announceRegions(regions) {
    const texts = regions.map((region) => {
      const name = [nameOf(region), probabilityOf(region)].filter(Boolean).join(", ");
      return `Region ${region.number}: ${name}.`;
    });
    if (regions.length === 1 && regions[0].caption) texts.push(regions[0].caption);
    this.announce(texts.join(" ") || "No regions found");
  }

  announcePlace([x, y]) {
    clearTimeout(this.#resting);
    this.#resting = setTimeout(() => this.announce(`${x} across, ${y} down`), REST);
  }
}
