/** A picture: the bytes that the server gets, and what the page shows of them. */

import { Problem } from "./api.js";

const JPEG_QUALITY = 0.92;

export class Picture {
  /** `blob` has the bytes, `image` the decoded <img>: upright, as the server sees it. */
  constructor(blob, name, image) {
    this.blob = blob;
    this.name = name;
    this.image = image;
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    this.id = null; // the promise of the server's id
  }

  /** Decodes a file. Browsers turn an <img> by the EXIF orientation, as the server does. */
  static async open(blob, name) {
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(image.src);
      throw new Problem(
        `${name} cannot be shown; this browser reads PNG, JPEG, WebP, GIF and BMP.`,
      );
    }
    return new Picture(blob, name, image);
  }

  close() {
    URL.revokeObjectURL(this.image.src);
  }

  /** Says why the server would refuse this picture; an empty text if it would not. */
  excess({ pixels, body_bytes: bytes }) {
    const area = this.width * this.height;
    if (area > pixels) {
      return `${this.name} has ${millions(area)} megapixels; the server takes ${millions(pixels)}.`;
    }
    if (this.blob.size > bytes) {
      const [has, takes] = [this.blob.size, bytes].map(millions);
      return `${this.name} has ${has} MB; the server takes ${takes} MB.`;
    }
    return "";
  }

  /** Returns a smaller copy within the limits, as JPEG. */
  async shrunk({ pixels, body_bytes: bytes }) {
    let scale = Math.min(1, Math.sqrt(pixels / (this.width * this.height)));
    for (;;) {
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(2, Math.floor(this.width * scale));
      canvas.height = Math.max(2, Math.floor(this.height * scale));
      const context = canvas.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
      const blob = await blobOf(canvas, "image/jpeg");
      if (blob.size <= bytes || canvas.width * canvas.height === 4) {
        return Picture.open(blob, this.name.replace(/\.\w+$/, "") + ".jpg");
      }
      scale *= 0.8;
    }
  }
}

/** The file of a canvas. Browsers have a largest canvas, beyond which there is none. */
export async function blobOf(canvas, type) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, JPEG_QUALITY));
  if (!blob)
    throw new Problem(`This browser cannot draw ${canvas.width} × ${canvas.height} pixels.`);
  return blob;
}

function millions(count) {
  return (count / 1e6).toFixed(count < 1e7 ? 1 : 0);
}
