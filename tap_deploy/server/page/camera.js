/** Takes a picture with the camera of the device. */

import { Problem } from "./api.js";
import { choiceIn } from "./dialog.js";
import { blobOf } from "./picture.js";

const REASONS = {
  NotAllowedError: "The browser may not use the camera; allow it in the settings of this page.",
  NotFoundError: "There is no camera on this device.",
  NotReadableError: "Another program uses the camera; close it and try again.",
};

/** Shows the camera in `dialog`; returns a JPEG file, or null if the user has cancelled. */
export async function takePicture(dialog) {
  if (!navigator.mediaDevices) {
    throw new Problem(
      "The camera can only be used on https, or on this computer itself (localhost).",
    );
  }
  const stream = await openCamera();
  const video = dialog.querySelector("video");
  video.srcObject = stream;
  dialog.showModal();
  try {
    return (await choiceIn(dialog)) === "take" ? await photograph(video) : null;
  } finally {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  }
}

async function openCamera() {
  const size = { width: { ideal: 1920 }, height: { ideal: 1080 } };
  try {
    return await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", ...size },
    });
  } catch (error) {
    throw new Problem(REASONS[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
}

async function photograph(video) {
  if (!video.videoWidth) await new Promise((loaded) => (video.onloadeddata = loaded));
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new File([await blobOf(canvas, "image/jpeg")], "camera.jpg", { type: "image/jpeg" });
}
