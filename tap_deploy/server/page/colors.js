/** Colours of regions: the palette of Okabe and Ito, which differ for the colour-blind, too. */

const PALETTE = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

/** The colour of a region by its number, which starts at 1. */
export function colorOf(number) {
  return PALETTE[(number - 1) % PALETTE.length];
}

/** Black or white, whichever is read better on a colour "#rrggbb". */
export function inkOn(color) {
  const [red, green, blue] = [1, 3, 5].map(
    (at) => (parseInt(color.slice(at, at + 2), 16) / 255) ** 2.2,
  );
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return luminance > 0.18 ? "#000" : "#fff"; // at 0.18 both have the same contrast
}
