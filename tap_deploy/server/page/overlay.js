/** What is drawn over the picture: masks, numbers, the selected prompt, what is being drawn now. */

import { inkOn } from "./colors.js";
import { anchorOf, outlineOf } from "./masks.js";

const DARK = "rgba(0, 0, 0, 0.75)";
const LIGHT = "#fff";
const FONT = "system-ui, sans-serif";

const shapes = new WeakMap(); // segmentation -> {step, path, anchor}

/** Outlines are made once for each size of the picture on the screen. */
function shapeOf(segmentation, step) {
  let known = shapes.get(segmentation);
  if (known?.step !== step) {
    known = { step, path: outlineOf(segmentation, step), anchor: anchorOf(segmentation) };
    shapes.set(segmentation, known);
  }
  return known;
}

/** A canvas over the picture, redrawn at most once a frame. */
export class Overlay {
  #canvas;
  #layer = document.createElement("canvas"); // masks and numbers: they change less often
  #layerOf = []; // what they were drawn from
  #scene = null;
  #asked = false;

  constructor(canvas) {
    this.#canvas = canvas;
  }

  /**
   * Draws {width, height, regions, selected, draft, crosshair}, in pixels of the picture.
   *
   * `draft` is {box} or {sketch} under the pointer, `crosshair` [x, y]; both may be null.
   */
  show(scene) {
    this.#scene = scene;
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#draw(this.#scene);
    });
  }

  #draw(scene) {
    const canvas = this.#canvas;
    const ratio = window.devicePixelRatio;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const scale = canvas.clientWidth / scene.width;
    if (!scale) return; // not laid out
    this.#drawLayer(scene, scale, ratio);
    const context = canvas.getContext("2d");
    context.drawImage(this.#layer, 0, 0);
    context.scale(ratio, ratio);
    if (scene.selected) {
      drawPrompt(context, scene.selected.prompt, scale);
      drawNumber(context, scene.selected, scale, stepAt(scale * ratio)); // above the prompt
    }
    if (scene.draft) drawPrompt(context, scene.draft, scale);
    if (scene.crosshair) drawCrosshair(context, scene.crosshair, scale);
  }

  #drawLayer(scene, scale, ratio) {
    const { width, height } = this.#canvas;
    const drawnOf = [width, height, scene.selected, ...scene.regions.map(({ answer }) => answer)];
    const known = this.#layerOf;
    if (known.length === drawnOf.length && known.every((each, at) => each === drawnOf[at])) return;
    this.#layerOf = drawnOf;
    Object.assign(this.#layer, { width, height });
    const context = this.#layer.getContext("2d");
    context.scale(ratio, ratio);
    const step = stepAt(scale * ratio);
    drawMasks(context, scene, scale, step);
    for (const region of scene.regions) drawNumber(context, region, scale, step);
  }
}

/** The distance of the pixels to look at, where one takes `size` pixels of the screen. */
function stepAt(size) {
  return Math.max(1, Math.floor(1 / size));
}

/** Fills every mask, the selected one last and outlined. `scale`: screen pixels of a pixel. */
export function drawMasks(context, { regions, selected }, scale, step) {
  const masks = regions.filter((region) => region.answer?.segmentation);
  masks.sort((one, other) => (one === selected) - (other === selected));
  context.save();
  context.scale(scale, scale);
  context.lineJoin = "round";
  for (const region of masks) {
    const { path } = shapeOf(region.answer.segmentation, step);
    context.globalAlpha = region === selected ? 0.55 : 0.45;
    context.fillStyle = region.color;
    context.fill(path, "evenodd");
    context.globalAlpha = 1;
    const strokes =
      region === selected
        ? [
            [6, DARK],
            [3, LIGHT],
          ]
        : [[1.5, region.color]];
    for (const [width, color] of strokes) stroke(context, path, width / scale, color);
  }
  context.restore();
}

function drawNumber(context, region, scale, step) {
  const segmentation = region.answer?.segmentation;
  const anchor = segmentation && shapeOf(segmentation, step).anchor;
  if (anchor) drawLabel(context, [String(region.number)], region.color, anchor, scale, 12);
}

/** Writes texts on a badge whose middle is `anchor`, in pixels of the picture. */
export function drawLabel(context, texts, color, [x, y], scale, size) {
  context.font = `600 ${size}px ${FONT}`;
  const text = texts.filter(Boolean).join(" ");
  const width = Math.max(1.7 * size, context.measureText(text).width + size);
  const height = 1.7 * size;
  const right = context.canvas.width / context.getTransform().a; // of the canvas, in its own units
  const left = Math.max(1, Math.min(x * scale - width / 2, right - width - 1));
  const badge = new Path2D();
  badge.roundRect(left, y * scale - height / 2, width, height, height / 2);
  context.fillStyle = color;
  context.fill(badge);
  stroke(context, badge, size / 10, DARK);
  context.fillStyle = inkOn(color);
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, left + width / 2, y * scale + size / 16);
}

/** Draws {box, points, sketch}, each of which may be missing. */
function drawPrompt(context, { box, points = [], sketch }, scale) {
  if (box)
    drawBox(
      context,
      box.map((value) => value * scale),
    );
  if (sketch) drawSketch(context, sketch, scale);
  for (const [x, y, label] of points) {
    if (label < 2) drawPoint(context, x * scale, y * scale, label === 1); // 2 and 3: box corners
  }
}

function drawBox(context, [x0, y0, x1, y1]) {
  const path = new Path2D();
  path.rect(x0, y0, x1 - x0, y1 - y0);
  stroke(context, path, 4, DARK);
  context.setLineDash([7, 5]);
  stroke(context, path, 2, LIGHT);
  context.setLineDash([]);
}

function drawSketch(context, sketch, scale) {
  const path = new Path2D();
  path.moveTo(sketch[0][0] * scale, sketch[0][1] * scale);
  for (const [x, y] of sketch) path.lineTo(x * scale, y * scale);
  context.lineCap = context.lineJoin = "round";
  stroke(context, path, 6, DARK);
  stroke(context, path, 3, LIGHT);
}

/** A plus inside the region, a minus outside. */
function drawPoint(context, x, y, inside) {
  const disc = new Path2D();
  disc.arc(x, y, 8, 0, 2 * Math.PI);
  context.fillStyle = inside ? LIGHT : "#000";
  context.fill(disc);
  stroke(context, disc, 1.5, inside ? "#000" : LIGHT);
  const sign = new Path2D(inside ? "M-4 0H4M0-4V4" : "M-4 0H4");
  context.save();
  context.translate(x, y);
  stroke(context, sign, 2, inside ? "#000" : LIGHT);
  context.restore();
}

function drawCrosshair(context, [x, y], scale) {
  const path = new Path2D();
  path.arc(x * scale, y * scale, 5, 0, 2 * Math.PI);
  for (const [dx, dy] of [
    [1, 0],
    [-1, 0],
    [0, 1],
    [0, -1],
  ]) {
    path.moveTo(x * scale + 5 * dx, y * scale + 5 * dy);
    path.lineTo(x * scale + 22 * dx, y * scale + 22 * dy);
  }
  stroke(context, path, 4, DARK);
  stroke(context, path, 2, LIGHT);
}

function stroke(context, path, width, color) {
  context.lineWidth = width;
  context.strokeStyle = color;
  context.stroke(path);
}
