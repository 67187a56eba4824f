/** The list of regions beside the picture. */

import { inkOn } from "./colors.js";
import { nameOf, probabilityOf } from "./regions.js";

export class RegionList {
  #list;
  #items = new Map(); // number -> the parts of a region's item
  #onSelect;
  #onRemove;

  constructor(list, { onSelect, onRemove }) {
    this.#list = list;
    this.#onSelect = onSelect;
    this.#onRemove = onRemove;
  }

  /** Shows regions. Items keep their elements, and so the focus, as long as they have a region. */
  show(regions, selected) {
    const numbers = new Set(regions.map(({ number }) => number));
    for (const [number, { item }] of this.#items) {
      if (!numbers.has(number)) {
        item.remove();
        this.#items.delete(number);
      }
    }
    regions.forEach((region, at) => {
      const parts = this.#items.get(region.number) ?? this.#make(region);
      parts.region = region;
      fill(parts, region, region === selected);
      if (this.#list.children[at] !== parts.item) {
        this.#list.insertBefore(parts.item, this.#list.children[at] ?? null);
      }
    });
  }

  /** Scrolls the list, where it is one that scrolls, and never the page. */
  showLast() {
    this.#list.scrollTop = this.#list.scrollHeight;
  }

  /** Moves the focus to the item at an index, or to the last; false if there is none. */
  focus(index) {
    const item = this.#list.children[Math.min(index, this.#list.children.length - 1)];
    item?.querySelector("button").focus();
    return item !== undefined;
  }

  #make(region) {
    const part = (tag, name) => Object.assign(document.createElement(tag), { className: name });
    const [item, pick, remove] = [
      part("li", "region"),
      part("button", "pick"),
      part("button", "icon remove"),
    ];
    const parts = { item, pick, remove, region };
    for (const name of ["number", "name", "probability", "caption"]) {
      parts[name] = part("span", name);
      pick.append(parts[name], " "); // the space is read between the parts of the button's name
    }
    pick.type = remove.type = "button";
    remove.append(document.getElementById("cross").content.cloneNode(true));
    pick.addEventListener("click", () => this.#onSelect(parts.region));
    remove.addEventListener("click", () => this.#onRemove(parts.region));
    item.append(pick, remove);
    this.#items.set(region.number, parts);
    return parts;
  }
}

function fill(parts, region, isSelected) {
  const waits = region.answer === null;
  setText(parts.number, String(region.number));
  setText(parts.name, waits ? "…" : nameOf(region));
  setText(parts.probability, probabilityOf(region));
  setText(parts.caption, region.caption ?? "");
  parts.number.style.backgroundColor = region.color;
  parts.number.style.color = inkOn(region.color);
  parts.item.classList.toggle("selected", isSelected);
  parts.item.classList.toggle("writing", region.writing);
  parts.pick.setAttribute("aria-current", String(isSelected));
  parts.remove.setAttribute("aria-label", `Remove region ${region.number}, ${nameOf(region)}`);
  parts.remove.title = "Remove";
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
