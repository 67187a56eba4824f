/** Mouse, pen and touch on the picture. Two fingers are left to the browser: they zoom. */

import { aimOf } from "./pen.js";

/**
 * Draws with a pen on `frame`.
 *
 * size() is [width, height] of the picture; tool() and aim() are what is set in the toolbar;
 * onPrompt(prompt, aim) gets what pen.up returns; onMove() is called while something changes.
 */
export function drawByPointer({ frame, pen, size, tool, aim, onPrompt, onMove }) {
  const placeOf = (event) => {
    const { left, top, width, height } = frame.getBoundingClientRect();
    const [pictureWidth, pictureHeight] = size();
    return [
      within(((event.clientX - left) / width) * pictureWidth, pictureWidth),
      within(((event.clientY - top) / height) * pictureHeight, pictureHeight),
    ];
  };
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    frame.setPointerCapture(event.pointerId);
    pen.down(tool(), placeOf(event));
    onMove();
  });
  frame.addEventListener("pointermove", (event) => {
    if (!pen.isDown || !event.isPrimary) return;
    pen.move(placeOf(event));
    onMove();
  });
  frame.addEventListener("pointerup", (event) => {
    if (!pen.isDown || !event.isPrimary) return;
    const prompt = pen.up();
    onMove();
    onPrompt(prompt, aimOf(event, aim()));
  });
  frame.addEventListener("pointercancel", () => {
    pen.cancel(); // the browser scrolls or zooms instead
    onMove();
  });
}

function within(value, limit) {
  return Math.round(100 * Math.min(limit, Math.max(0, value))) / 100;
}
