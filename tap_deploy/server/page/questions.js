/** What is being asked about the open picture, and the answers on their way. */

import { Problem } from "./api.js";

export class Questions {
  picture = null;
  #api;
  #regions;
  #running = new Set(); // AbortControllers
  #on;

  /**
   * `on` has onChange(), called whenever an answer grows or the number of requests changes;
   * onFinished(regions), when their captions are complete; onProblem(error).
   */
  constructor(api, regions, on) {
    this.#api = api;
    this.#regions = regions;
    this.#on = on;
  }

  get busy() {
    return this.#running.size > 0;
  }

  /** Takes a picture and sends it; the one before is forgotten here and on the server. */
  open(picture) {
    this.stop();
    const before = this.picture;
    this.picture = picture;
    before?.close();
    before?.id?.then(
      (id) => this.#api.forget(id),
      () => {},
    );
    return this.#track(null, (signal) => this.#send(picture, signal));
  }

  /** Asks for a region that is in the list. */
  ask(region) {
    return this.#listen("regions", { prompts: [region.prompt] }, region, ([answer]) => {
      region.answer = answer;
      return [region];
    });
  }

  /** Asks for everything; the regions found take the place of those in the list. */
  everything() {
    return this.#listen("everything", {}, null, (answers) => {
      const found = answers.map((answer, index) => {
        const points = answer.points.filter(([, , label]) => label < 2);
        return Object.assign(this.#regions.make({ points }, index + 1), { answer });
      });
      this.#regions.replaceAll(found);
      return found;
    });
  }

  /** Gives up everything that is still on its way. */
  stop() {
    for (const controller of this.#running) controller.abort();
  }

  async #listen(action, question, asked, receive) {
    const { picture } = this;
    let regions = [];
    try {
      await this.#track(asked, async (signal) => {
        for await (const { event, data } of this.#answers(picture, action, question, signal)) {
          if (event === "regions") regions = receive(data.regions);
          if (event === "captions")
            for (const { index, caption } of data.captions) regions[index].caption = caption;
          if (event === "done") finish(regions, data.captions ?? []);
          this.#on.onChange();
        }
        this.#on.onFinished(regions);
      });
    } finally {
      for (const region of regions.filter(({ writing }) => writing)) {
        Object.assign(region, { writing: false, caption: `${region.caption}…` }); // it broke off
      }
      this.#on.onChange();
    }
  }

  /** Runs a request that can be stopped; `asked` is dropped if it ends without an answer. */
  async #track(asked, request) {
    const controller = new AbortController();
    this.#running.add(controller);
    this.#on.onChange();
    try {
      await request(controller.signal);
    } catch (error) {
      if (asked?.answer === null) this.#regions.drop(asked);
      if (error.name !== "AbortError") this.#on.onProblem(error);
    } finally {
      this.#running.delete(controller);
      this.#on.onChange();
    }
  }

  /** The events of an answer. A server that has dropped the picture gets it again. */
  async *#answers(picture, action, question, signal) {
    const id = this.#send(picture, signal);
    try {
      yield* this.#api.ask(await id, action, question, signal);
    } catch (error) {
      if (!(error instanceof Problem) || error.status !== 404) throw error;
      yield* this.#api.ask(await this.#send(picture, signal, id), action, question, signal);
    }
  }

  /** The promise of the server's id of a picture: sent once, and again if `dropped` was its id. */
  #send(picture, signal, dropped = null) {
    if (picture.id !== dropped) return picture.id;
    const id = this.#api.upload(picture.blob, signal).then((answer) => idOf(answer, picture));
    picture.id = id;
    id.catch(() => picture.id === id && (picture.id = null)); // the next question sends it again
    return id;
  }
}

/** Coordinates mean the same only if server and browser agree on which side is up. */
function idOf({ image_id: id, width, height }, picture) {
  if (width === picture.width && height === picture.height) return id;
  const seen = `${picture.width} × ${picture.height}`;
  throw new Problem(
    `The server sees ${width} × ${height} pixels, this browser ${seen}; ` +
      "turn the picture upright in an editor and save it.",
  );
}

function finish(regions, captions) {
  regions.forEach((region, index) => {
    region.caption = captions[index] ?? null;
    region.writing = false;
  });
}
