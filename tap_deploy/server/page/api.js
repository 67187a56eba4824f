/** The server, as docs/serve.md describes it. */

import { eventsOf } from "./events.js";

/** A refusal of the server, or no answer at all. The message is one line for the user. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Attempts before giving up: a full queue drains in seconds, a large model loads in minutes. Too
// many connections are a 503, too.
const ATTEMPTS = { 429: 6, 503: 60 };
const WAITING = { 429: "The server is busy", 503: "The server cannot answer yet" };

export class Api {
  #token = "";
  #asking = null;
  #model = null; // a promise
  #askToken;
  #onWait;

  /**
   * askToken(wrong) asks the user for a token and returns a promise of it, null if there is none.
   * onWait(text) says why nothing happens; an empty text says that it goes on.
   */
  constructor({ askToken, onWait }) {
    this.#askToken = askToken;
    this.#onWait = onWait;
  }

  /** The server's model, for which it is asked until it has answered once. */
  model() {
    this.#model ??= this.#request("v1/model")
      .then((response) => response.json())
      .catch((error) => {
        this.#model = null;
        throw error;
      });
    return this.#model;
  }

  /** Sends the bytes of a picture; returns {image_id, width, height}. */
  async upload(blob, signal) {
    const headers = { "Content-Type": blob.type || "application/octet-stream" };
    return (
      await this.#request("v1/images", { method: "POST", body: blob, headers, signal })
    ).json();
  }

  /** Lets the server drop a picture before its memory runs out. */
  async forget(id) {
    await this.#request(`v1/images/${id}`, { method: "DELETE" }).catch(() => {});
  }

  /** Asks about a picture; yields the events {event, data} of the answer. */
  async *ask(id, action, question, signal) {
    const body = JSON.stringify({ ...question, stream: true });
    const headers = { "Content-Type": "application/json" };
    const path = `v1/images/${id}/${action}`;
    const response = await this.#request(path, { method: "POST", body, headers, signal });
    try {
      for await (const event of eventsOf(response.body)) {
        if (event.event === "error") throw new Problem(event.data.detail, event.data.status);
        yield event;
        if (event.event === "done") return;
      }
    } catch (error) {
      throw knownError(error);
    }
    throw new Problem("The answer of the server broke off; try again.");
  }

  async #request(path, options = {}) {
    for (let attempt = 1; ; attempt++) {
      const token = this.#token;
      const response = await this.#fetch(path, options, token);
      if (response.ok) return response;
      const { status } = response;
      if (status === 401) {
        await this.#newToken(token);
      } else if (attempt < (ATTEMPTS[status] ?? 0)) {
        const seconds = Number(response.headers.get("Retry-After")) || 1;
        this.#onWait(`${WAITING[status]}; trying again in ${seconds} s.`);
        await pause(seconds, options.signal).finally(() => this.#onWait(""));
      } else {
        throw await problemOf(response);
      }
    }
  }

  async #fetch(path, options, token) {
    const headers = token
      ? { ...options.headers, Authorization: `Bearer ${token}` }
      : options.headers;
    try {
      return await fetch(path, { ...options, headers });
    } catch (error) {
      throw knownError(error);
    }
  }

  /** Asks for a token unless another request has got a new one since `used`. */
  async #newToken(used) {
    if (this.#token !== used) return;
    this.#asking ??= this.#askToken(used !== "").finally(() => (this.#asking = null));
    const token = await this.#asking;
    if (token === null)
      throw new Problem("The server answers only with a token; try again to enter one.", 401);
    this.#token = token;
  }
}

async function problemOf(response) {
  const problem = await response.json().catch(() => ({}));
  return new Problem(
    problem.detail || `The server answered with status ${response.status}.`,
    response.status,
  );
}

/** Errors of fetch and of a body that ends early say nothing useful; an abort is the user's own. */
function knownError(error) {
  if (error instanceof Problem || error.name === "AbortError") return error;
  return new Problem("The server does not answer; check that it is running, and try again.");
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
