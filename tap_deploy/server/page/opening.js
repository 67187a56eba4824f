/** From a file to a picture that the server takes. */

import { Problem } from "./api.js";
import { choiceIn } from "./dialog.js";
import { Picture } from "./picture.js";

export class Opening {
  #dialog;
  #connect;
  #files = 0; // so far

  /** `dialog` asks before a picture is shrunk; connect() is a promise of the server's model. */
  constructor(dialog, connect) {
    this.#dialog = dialog;
    this.#connect = connect;
  }

  /** Returns a Picture; null if the user has cancelled, or has chosen another file meanwhile. */
  async pictureOf(file) {
    const number = ++this.#files;
    const isLast = () => number === this.#files;
    this.#dialog.close(); // it asks about the file before
    try {
      const whole = await Picture.open(file, file.name || "picture.png");
      const picture = await this.#withinLimits(whole, isLast);
      if (isLast()) return picture;
      picture?.close();
    } catch (error) {
      if (isLast() || !(error instanceof Problem)) throw error;
    }
    return null;
  }

  async #withinLimits(picture, isLast) {
    const { limits } = await this.#connect();
    const excess = picture.excess(limits);
    if (!excess || !isLast()) return picture;
    this.#dialog.querySelector("p").textContent =
      `${excess} A smaller copy can be sent instead; regions and downloads are then of that copy.`;
    this.#dialog.showModal();
    const agreed = (await choiceIn(this.#dialog)) === "shrink" && isLast();
    const smaller = agreed ? await picture.shrunk(limits) : null;
    picture.close();
    return smaller;
  }
}
