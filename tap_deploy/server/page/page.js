/** The page: its parts, and what happens between them. */

import { Api, Problem } from "./api.js";
import { takePicture } from "./camera.js";
import { cocoOf, jsonOf, pngOf, save } from "./downloads.js";
import { takeFiles } from "./intake.js";
import { Crosshair } from "./keyboard.js";
import { RegionList } from "./list.js";
import { Notices } from "./notices.js";
import { Opening } from "./opening.js";
import { Overlay } from "./overlay.js";
import { Pen } from "./pen.js";
import { drawByPointer } from "./pointer.js";
import { Questions } from "./questions.js";
import { refined, Regions } from "./regions.js";
import { askToken } from "./token.js";
import { Toolbar } from "./toolbar.js";

const at = (id) => document.getElementById(id);
const frame = at("frame");
const stage = at("stage");

const notices = new Notices({
  status: at("status"),
  error: at("error"),
  announcement: at("announcement"),
});
const api = new Api({
  askToken: (wrong) => askToken(at("token-dialog"), wrong),
  onWait: (text) => notices.say(text),
});
const regions = new Regions(() => show());
const questions = new Questions(api, regions, {
  onChange: () => show(),
  onFinished: announce,
  onProblem: report,
});
const opening = new Opening(at("shrink-dialog"), connect);
const list = new RegionList(at("regions"), { onSelect: select, onRemove: remove });
const overlay = new Overlay(at("overlay"));
const toolbar = new Toolbar(() => show());
const pen = new Pen();
const drawing = {
  frame,
  pen,
  size: () => [questions.picture.width, questions.picture.height],
  tool: () => toolbar.tool,
  aim: () => toolbar.aim,
  onPrompt: prompt,
  onMove: draw,
  onPlace: (place) => notices.announcePlace(place),
};
const crosshair = new Crosshair(drawing);
let searches = false; // for everything

drawByPointer(drawing);
takeFiles({
  buttons: [at("open"), at("choose")],
  input: at("file"),
  stage,
  onFile: open,
  onWrong: (text) => notices.fail(text),
});
at("camera").addEventListener("click", photograph);
at("everything").addEventListener("click", everything);
at("undo").addEventListener("click", () => regions.undo());
at("redo").addEventListener("click", () => regions.redo());
at("clear").addEventListener("click", () => regions.replaceAll([]));
at("png").addEventListener("click", () => download(pngOf, ".regions.png"));
at("coco").addEventListener("click", () => download(cocoOf, ".coco.json"));
at("json").addEventListener("click", () => download(jsonOf, ".regions.json"));
document.addEventListener("keydown", press);
new ResizeObserver(fit).observe(stage);
show();
connect().catch(report);

/** Returns the server's model, and shows which it is. */
async function connect() {
  const model = await api.model();
  at("model").textContent = `${model.name}, ${model.backend} ${model.precision}`;
  return model;
}

/** Opens a picture; if the server would refuse it and the user agrees, a smaller copy. */
async function open(file) {
  notices.fail("");
  try {
    const picture = await opening.pictureOf(file);
    if (!picture) return;
    regions.reset();
    crosshair.hide();
    pen.cancel();
    at("photo").replaceWith(Object.assign(picture.image, { id: "photo", alt: "" }));
    frame.setAttribute(
      "aria-label",
      `Picture ${picture.name}, ${picture.width} by ${picture.height} pixels`,
    );
    const sent = questions.open(picture);
    fit();
    frame.focus({ preventScroll: true });
    await sent;
  } catch (error) {
    report(error);
  }
}

async function photograph() {
  try {
    const file = await takePicture(at("camera-dialog"));
    if (file) await open(file);
  } catch (error) {
    report(error);
  }
}

/** A finished stroke: a new region, or one more point of the selected region. */
function prompt(stroke, aim) {
  notices.fail("");
  if (!stroke)
    return notices.fail("That box is too small; drag from one corner of the object to the other.");
  if (stroke.point && aim !== "new") return refine(stroke.point, aim);
  const region = regions.make(stroke.point ? { points: [[...stroke.point, 1]] } : stroke);
  regions.add(region);
  list.showLast();
  return questions.ask(region);
}

function refine(point, aim) {
  const before = regions.selected;
  if (!before)
    return notices.fail("No region is selected; click without Shift and Alt to start one.");
  const changed = refined(before, point, aim === "inside" ? 1 : 0);
  if (!changed) return notices.fail("This region has no answer yet; wait for it, then refine it.");
  const region = regions.make(changed, before.number);
  regions.replace(before, region);
  return questions.ask(region);
}

async function everything() {
  if (searches) return questions.stop();
  notices.fail("");
  searches = true;
  try {
    await questions.everything();
  } finally {
    searches = false;
    show();
  }
}

/** Says what was found, but nothing of regions that were replaced or removed meanwhile. */
function announce(answered) {
  const shown = answered.filter((region) => regions.list.includes(region));
  if (shown.length || !answered.length) notices.announceRegions(shown);
}

function select(region) {
  regions.select(region === regions.selected ? null : region);
}

function remove(region) {
  const index = regions.list.indexOf(region);
  const wasInList = at("regions").contains(document.activeElement);
  regions.remove(region);
  notices.announce(`Region ${region.number} removed`);
  if (wasInList && !list.focus(index)) at("regions-title").focus();
}

async function download(make, ending) {
  const answered = regions.list.filter(({ answer }) => answer);
  try {
    save(await make(questions.picture, answered, await connect()), questions.picture, ending);
  } catch (error) {
    report(error);
  }
}

function press(event) {
  if (event.target.closest("dialog")) return;
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  const tool = { p: "point", b: "box", s: "sketch" }[key];
  if (control && key === "z") event.shiftKey ? regions.redo() : regions.undo();
  else if (control && key === "y") regions.redo();
  else if (control || event.altKey) return;
  else if (key === "escape") cancel();
  else if (["delete", "backspace"].includes(key) && regions.selected) remove(regions.selected);
  else if (tool && event.target === frame) toolbar.choose(tool);
  else return;
  event.preventDefault();
}

/** Escape gives up the nearest thing: a stroke, a request, or the selection. */
function cancel() {
  notices.fail("");
  if (pen.isDown) pen.cancel();
  else if (questions.busy) questions.stop();
  else regions.select(null);
  show();
}

function report(error) {
  if (!(error instanceof Problem)) throw error; // a mistake of this page: it belongs in the console
  notices.fail(error.message);
}

/** Gives the picture the largest size that fits the stage. */
function fit() {
  const { picture } = questions;
  if (!picture) return;
  stage.style.setProperty("--ratio", picture.width / picture.height);
  show();
  const scale = Math.min(stage.clientWidth / picture.width, stage.clientHeight / picture.height);
  frame.style.width = `${Math.floor(picture.width * scale)}px`;
  frame.style.height = `${Math.floor(picture.height * scale)}px`;
}

/** Brings everything on the page up to date with the picture, the regions and the tools. */
function show() {
  const { picture, busy } = questions;
  const { list: all, selected } = regions;
  toolbar.show({ picture, regions, searches });
  frame.dataset.tool = toolbar.tool;
  at("empty").hidden = picture !== null;
  frame.hidden = picture === null;
  at("progress").hidden = !busy;
  at("none").hidden = all.length > 0;
  at("count").textContent = all.length || "";
  list.show(all, selected);
  for (const id of ["png", "coco", "json"]) at(id).disabled = !all.some(({ answer }) => answer);
  draw();
}

function draw() {
  if (!questions.picture) return;
  const { width, height } = questions.picture;
  const { list: all, selected } = regions;
  overlay.show({
    width,
    height,
    regions: all,
    selected,
    draft: pen.draft,
    crosshair: crosshair.place,
  });
}
