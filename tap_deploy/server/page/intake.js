/** Ways for a picture into the page: file dialog, paste and drop. */

/** Calls onFile(file) for every picture; onWrong(message) if it is none. */
export function takeFiles({ buttons, input, stage, onFile, onWrong }) {
  const take = (files) => {
    const file = [...files].find(({ type }) => type.startsWith("image/"));
    if (file) onFile(file);
    else onWrong("That is not a picture; expected a file like PNG or JPEG.");
  };
  for (const button of buttons) button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files);
    input.value = ""; // the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
  takeDrops(stage, take);
}

function takeDrops(stage, take) {
  let depth = 0; // dragenter and dragleave come for every child, too
  const over = (change) => {
    depth = Math.max(0, depth + change);
    stage.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", () => over(1));
  document.addEventListener("dragleave", () => over(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser would leave the page for the file
    over(-depth);
    take(event.dataTransfer.files);
  });
}
