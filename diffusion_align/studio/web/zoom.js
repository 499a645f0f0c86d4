// Pictures in full size: the same part of all of them, and Space held down shows one in place of the other.
import { el } from "./common.js";

export function zoom(sources) {
  const panes = sources.map((source) => {
    const image = el("img", { alt: "" });
    image.src = source;
    return el("div", { class: "pane" }, image);
  });
  const held = el("div", { class: "panes" }, panes);
  const made = el("dialog", { class: "zoom", "aria-label": "Full size" }, held,
    el("div", { class: "hint" }, el("span", {}, "wheel or + − zooms · drag moves · hold Space swaps · Z or Esc closes")));
  let scale = 1, x = 0, y = 0, front = 0;
  const place = () => {
    for (const pane of panes) pane.firstChild.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  };
  const zoomed = (factor, px, py) => {
    const next = Math.min(16, Math.max(1, scale * factor));
    x = px - (px - x) * (next / scale);
    y = py - (py - y) * (next / scale);
    scale = next;
    if (scale === 1) { x = 0; y = 0; }
    place();
  };
  held.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = event.target.closest(".pane")?.getBoundingClientRect();
    if (box) zoomed(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  held.addEventListener("pointerdown", (event) => {
    if (event.target.closest(".pane")) held.setPointerCapture(event.pointerId);
  });
  held.addEventListener("pointermove", (event) => {
    if (!held.hasPointerCapture(event.pointerId)) return;
    x += event.movementX;
    y += event.movementY;
    place();
  });
  const keys = (event) => {
    event.stopPropagation();
    if (event.key === "z" || event.key === "Z") made.close();
    const box = panes[0].getBoundingClientRect();
    if (event.key === "+" || event.key === "=") zoomed(1.5, box.width / 2, box.height / 2);
    if (event.key === "-") zoomed(1 / 1.5, box.width / 2, box.height / 2);
    if (event.key === " ") {
      event.preventDefault();
      if (event.repeat) return;
      front = (front + 1) % panes.length;
      held.classList.add("flicker");
      panes.forEach((pane, i) => pane.classList.toggle("front", i === front));
    }
  };
  made.addEventListener("keydown", keys);
  made.addEventListener("keyup", (event) => {
    event.stopPropagation();
    if (event.key === " ") {
      front = 0;
      held.classList.remove("flicker");
    }
  });
  made.addEventListener("close", () => made.remove());
  document.body.append(made);
  made.showModal();
  return made;
}
