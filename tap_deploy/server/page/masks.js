/**
 * Outlines of masks, made from run lengths.
 *
 * The picture is never decoded as a whole: only every `step`th pixel of every `step`th column is
 * looked at, so the cost follows the size on the screen and not the size of the picture.
 */

/**
 * The outline of a mask as a Path2D in pixels of the picture, to be filled by "evenodd".
 *
 * `rle` is COCO's uncompressed form: {size: [height, width], counts}, runs down the columns,
 * background first.
 */
export function outlineOf(rle, step) {
  return pathAround(gridOf(rle, step));
}

/** Samples a mask: 1 inside, with a margin of one cell of 0 around it, stored by columns. */
function gridOf({ size: [height, width], counts }, step) {
  const half = step >> 1;
  const [first, last] = columnsOf(counts, height).map((x) => Math.floor(x / step));
  const rows = Math.floor((height - 1 - half) / step) + 1;
  const stride = rows + 2;
  const cells = new Uint8Array(Math.max(0, last - first + 3) * stride);
  const columnLimit = Math.min(last, Math.floor((width - 1 - half) / step));
  for (const [start, end] of runsOf(counts)) {
    const from = Math.max(first, Math.ceil((Math.floor(start / height) - half) / step));
    const to = Math.min(columnLimit, Math.floor((Math.floor((end - 1) / height) - half) / step));
    for (let column = from; column <= to; column++) {
      const top = (column * step + half) * height;
      const y0 = Math.ceil((Math.max(0, start - top) - half) / step);
      const y1 = Math.ceil((Math.min(height, end - top) - half) / step);
      const base = (column - first + 1) * stride + 1;
      cells.fill(1, base + Math.max(0, y0), base + Math.min(rows, y1));
    }
  }
  return { cells, stride, first, step };
}

/** Yields [start, end) of every run of the foreground. */
function* runsOf(counts) {
  for (let at = 0, start = 0; at < counts.length; at++) {
    const end = start + counts[at];
    if (at % 2 && end > start) yield [start, end];
    start = end;
  }
}

function columnsOf(counts, height) {
  let first = null;
  let last = -1;
  for (const [start, end] of runsOf(counts)) {
    first ??= Math.floor(start / height);
    last = Math.floor((end - 1) / height);
  }
  return [first ?? 0, last];
}

/** Follows every border of a grid with the inside on the right, and rounds the corners. */
function pathAround({ cells, stride, first, step }) {
  const path = new Path2D();
  const place = (x, y) => [(x - 1 + first) * step, (y - 1) * step];
  for (let at = 0; at < cells.length; at++) {
    // A cell below an empty one: its upper side is the start of a border, or on one walked before.
    if (cells[at] === 1 && !cells[at - 1]) walk(cells, stride, at, path, place);
  }
  return path;
}

const EAST = 0; // then south, west, north
const DX = [1, 0, -1, 0];
const DY = [0, 1, 0, -1];

/** Adds one border to the path, from the upper left corner of a cell; marks upper sides with 2. */
function walk(cells, stride, start, path, place) {
  let x = Math.floor(start / stride);
  let y = start % stride;
  const [startX, startY] = [x, y];
  const filled = (left, top) => cells[left * stride + top] > 0;
  let heading = EAST;
  let open = false;
  do {
    if (heading === EAST) cells[x * stride + y] = 2;
    x += DX[heading];
    y += DY[heading];
    const next = turned(heading, x, y, filled);
    if (next !== heading) {
      const before = place(x - DX[heading] / 2, y - DY[heading] / 2);
      const after = place(x + DX[next] / 2, y + DY[next] / 2);
      if (open) path.lineTo(...before);
      else path.moveTo(...before);
      path.quadraticCurveTo(...place(x, y), ...after);
      open = true;
    }
    heading = next;
  } while (x !== startX || y !== startY || heading !== EAST);
  path.closePath();
}

/** The heading after a corner: always with a cell of the mask on the right. */
function turned(heading, x, y, filled) {
  const right = (heading + 1) % 4;
  const left = (heading + 3) % 4;
  if (!filled(...cellAhead(heading, right, x, y))) return right;
  return filled(...cellAhead(heading, left, x, y)) ? left : heading;
}

/** The cell at a corner that lies ahead and on one side. */
function cellAhead(heading, side, x, y) {
  return [x + Math.min(0, DX[heading] + DX[side]), y + Math.min(0, DY[heading] + DY[side])];
}

/** A point [x, y] in the middle of a mask, for a label; null if the mask is empty. */
export function anchorOf({ size: [height], counts }) {
  let area = 0;
  let moment = 0;
  for (const [start, end] of runsOf(counts)) {
    area += end - start;
    moment += (end - start) * Math.floor((start + end) / 2 / height);
  }
  if (!area) return null;
  const centre = Math.round(moment / area);
  return middleOfColumn(counts, height, centre) ?? middleOfLongestRun(counts, height);
}

function middleOfColumn(counts, height, column) {
  let best = null;
  let length = 0;
  for (const [start, end] of runsOf(counts)) {
    const from = Math.max(start, column * height);
    const to = Math.min(end, (column + 1) * height);
    if (to - from > length) {
      length = to - from;
      best = [column + 0.5, (from + to) / 2 - column * height];
    }
  }
  return best;
}

function middleOfLongestRun(counts, height) {
  let longest = [0, 0];
  for (const run of runsOf(counts)) if (run[1] - run[0] > longest[1] - longest[0]) longest = run;
  const middle = Math.floor((longest[0] + longest[1]) / 2);
  return [Math.floor(middle / height) + 0.5, (middle % height) + 0.5];
}
