// What is drawn, and how far it is: the same fields and the same line on every page that draws.
import { el, field } from "./common.js";

/** Inputs of an order; `values()` is what the server is asked with. */
export function drawingInputs(count) {
  const inputs = {
    prompts: el("textarea", { rows: 2, placeholder: "one prompt a line" }),
    seed: el("input", { type: "number", value: "0", min: "0" }),
    count: el("input", { type: "number", value: String(count), min: "1" }),
    steps: el("input", { type: "number", value: "25", min: "1" }),
    guidance_scale: el("input", { type: "number", value: "5", step: "0.5" }),
    model: el("input", { placeholder: "scenes-sdxl" }),
  };
  const values = () => ({
    prompts: lines(inputs.prompts.value), model: inputs.model.value.trim(),
    ...Object.fromEntries(["seed", "count", "steps", "guidance_scale"].map((name) => [name, Number(inputs[name].value)])),
  });
  return { inputs, values };
}

export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** The prompts, and a button that takes them from a text file of this machine. */
export function promptsField(area) {
  const file = el("input", { type: "file", accept: ".txt,text/plain", hidden: true, "aria-label": "Text file" });
  file.addEventListener("change", async () => {
    if (file.files.length) area.value = (await file.files[0].text()).trim();
    file.value = "";
  });
  return el("div", { class: "stack tight" }, field("Prompts", area),
    el("div", {}, el("button", { class: "plain", onclick: () => file.click() }, "From a file …"), file));
}

/** How far an order is, in an element that stays. */
export function showJob(job, place, cancel) {
  if (!job) { place.replaceChildren(); return; }
  const left = job.left ? `, about ${job.left > 90 ? `${Math.round(job.left / 60)} min` : `${Math.ceil(job.left)} s`} left` : "";
  const text = { running: `${job.done} of ${job.total} pictures${job.step ? `, step ${job.step} of ${job.steps}` : job.done ? "" : ": opening the model"}${left}`,
    done: "", cancelled: `Cancelled after ${job.done} of ${job.total} pictures.`, failed: "" }[job.state];
  place.replaceChildren(...[
    job.state === "running" ? el("progress", { value: job.done + job.step / Math.max(1, job.steps), max: job.total }) : null,
    text ? el("span", { class: "muted number" }, text) : null,
    job.state === "running" ? el("button", { onclick: cancel }, "Cancel") : null,
    job.state === "failed" ? el("p", { class: "alarm", id: "failed" }, job.error) : null,
  ].filter(Boolean));
}
