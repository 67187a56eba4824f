/** Files of the regions: a picture, a COCO data set, JSON. */

import { anchorOf } from "./masks.js";
import { drawLabel, drawMasks } from "./overlay.js";
import { blobOf } from "./picture.js";
import { nameOf, probabilityOf } from "./regions.js";

const SMALLEST_SIDE = 1024; // small pictures are enlarged: names are read at this size

/** The picture with masks and names, PNG. */
export async function pngOf(picture, regions) {
  const longest = Math.max(picture.width, picture.height);
  const scale = Math.max(1, Math.round(SMALLEST_SIDE / longest));
  const canvas = document.createElement("canvas");
  canvas.width = picture.width * scale;
  canvas.height = picture.height * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture.image, 0, 0, canvas.width, canvas.height);
  drawMasks(context, { regions, selected: null }, scale, 1);
  const size = Math.round(Math.max(canvas.width, canvas.height) / 55);
  for (const region of regions) {
    const anchor = region.answer.segmentation && anchorOf(region.answer.segmentation);
    const texts = [nameOf(region), probabilityOf(region)];
    if (anchor) drawLabel(context, texts, region.color, anchor, scale, size);
  }
  return blobOf(canvas, "image/png");
}

/** A COCO data set of one picture, as tap_deploy's own coco_dataset makes it. */
export function cocoOf(picture, regions) {
  const names = [...new Set(regions.map(nameOf))];
  return {
    info: { description: "made by tap_deploy" },
    images: [{ id: 1, file_name: picture.name, width: picture.width, height: picture.height }],
    categories: names.map((name, index) => ({ id: index + 1, name })),
    annotations: regions.map(({ answer, caption }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: names.indexOf(nameOf(regions[index])) + 1,
      category_name: nameOf(regions[index]),
      bbox: answer.bbox,
      area: answer.area,
      score: answer.iou_prediction,
      iscrowd: 0,
      segmentation: answer.segmentation,
      caption,
    })),
  };
}

/** The answers of the server, with the prompts that were asked. */
export function jsonOf(picture, regions, model) {
  return {
    model: { name: model.name, version: model.version, precision: model.precision },
    image: { file_name: picture.name, height: picture.height, width: picture.width },
    regions: regions.map(({ answer, caption, prompt }, index) => ({
      ...answer,
      index,
      caption,
      prompt,
    })),
  };
}

/** Saves a blob, or JSON, as a file named after the picture. */
export function save(content, picture, ending) {
  const json = () => new Blob([JSON.stringify(content)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : json());
  link.download = picture.name.replace(/\.\w+$/, "") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may read it later
}
