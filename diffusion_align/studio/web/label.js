// Label: one stroke a verdict. The next pictures are decoded before they are needed.
import { ask, between, dialog, el, field, listen, main, notice, percent, picture, pictureUrl, select, table, tools, tried, warn } from "./common.js";
import { drawingInputs, lines, promptsField, showJob } from "./drawing.js";
import { zoom } from "./zoom.js";

const place = { task: undefined, annotator: undefined, drawing: undefined };
const ready = new Map();
let state = null, shownAt = 0, busy = false, pending = null, marks = [[], []], best = null;

const ids = () => ({ task: place.task, annotator: place.annotator });
const current = () => state?.visits[0];

function prefetch() {
  const wanted = new Set(state.visits.flatMap((visit) => visit.pictures));
  for (const id of ready.keys()) if (!wanted.has(id)) ready.delete(id);
  for (const id of wanted) {
    if (ready.has(id)) continue;
    const image = picture(id);
    image.decode().catch(() => undefined);
    ready.set(id, image);
  }
}

// Nothing is judged before its pictures are on the screen: until then keys and clicks do nothing.
async function show(found) {
  busy = true;
  state = found;
  pending = null;
  best = null;
  marks = current() ? current().pictures.map(() => []) : [];
  place.annotator = state.annotator;
  prefetch();
  draw();
  const images = (current()?.pictures ?? []).map((id) => ready.get(id));
  await Promise.all(images.map((image) => (image.complete ? undefined : image.decode().catch(() => undefined))));
  shownAt = performance.now();
  document.body.dataset.visit = current()?.id ?? "";
  busy = false;
}

const NAMES = { left: ["←", "Left"], right: ["→", "Right"] };
const OTHERS = [["tie", "↓", "Tie"], ["bad", "B", "Both bad"], ["skip", "S", "Skip"]];

function draw() {
  const visit = current();
  tools.replaceChildren(
    el("div", { class: "progress" }, el("span", { class: "number", id: "count" }, `${state.done} of ${state.done + state.left}`),
      el("progress", { value: state.done, max: Math.max(1, state.done + state.left), "aria-label": "Progress" })),
    el("button", { class: "plain", onclick: session, id: "session" }, state.annotator));
  if (!visit) {
    main.replaceChildren(el("div", { class: "finished" },
      el("h1", {}, state.done ? "Nothing left to judge" : "No pair is left for you"),
      el("p", { class: "muted" }, `${state.done} verdicts of ${state.annotator} are saved.`),
      el("div", { class: "row" }, el("button", { class: "primary", onclick: session }, "Summary and export"),
        el("button", { onclick: undo }, "Undo ", el("kbd", {}, "U")))));
    return;
  }
  const many = visit.pictures.length > 2;
  const stage = el("div", { class: many ? "stage many" : "stage" }, visit.pictures.map((id, i) => pick(id, i, many)));
  if (many) stage.style.setProperty("--across", Math.ceil(visit.pictures.length / (visit.pictures.length > 3 ? 2 : 1)));
  main.replaceChildren(
    el("p", { class: "prompt" }, visit.prompt),
    stage,
    ...(state.aspects.length ? [aspects()] : []),
    el("div", { class: "verdicts" },
      OTHERS.map(([choice, key, text]) => el("button", { onclick: () => choose({ choice }), "data-choice": choice },
        el("kbd", {}, key), many && choice === "bad" ? "All bad" : text)),
      el("button", { onclick: undo, id: "undo" }, el("kbd", {}, "U"), "Undo"),
      el("button", { onclick: enlarge }, el("kbd", {}, "Z"), "Zoom"),
      el("button", { onclick: help, "aria-label": "Help" }, el("kbd", {}, "?"), "Help")));
}

function pick(id, i, many) {
  const [key, text] = many ? [String(i + 1), ""] : NAMES[i ? "right" : "left"];
  const image = ready.get(id);
  return el("div", { class: "side" },
    el("button", { class: "pick", "data-place": String(i), "aria-label": many ? `Picture ${i + 1}` : text,
      onclick: () => (many ? ranked(i) : choose({ choice: i ? "right" : "left" })) },
      el("span", { class: "frame" }, image),
      el("span", { class: "caption" }, el("kbd", {}, key), text)),
    state.words ? words(i) : null);
}

function words(i) {
  return el("div", { class: "words" }, current().prompt.split(/\s+/).filter(Boolean).map((word, place) =>
    el("button", { "aria-pressed": "false", title: "The picture does not show this", onclick: (event) => {
      const at = marks[i].indexOf(place);
      if (at < 0) marks[i].push(place); else marks[i].splice(at, 1);
      event.currentTarget.setAttribute("aria-pressed", String(at < 0));
      event.currentTarget.blur();
    } }, word)));
}

function aspects() {
  const given = pending?.aspects ?? {};
  const next = state.aspects.find((name) => !(name in given));
  return el("div", { class: "aspects" }, state.aspects.map((name) =>
    el("div", { class: `row${pending && name === next ? " current" : ""}` }, el("span", { class: "name" }, name),
      [["1", "left"], ["2", "equal"], ["3", "right"]].map(([key, text]) =>
        el("button", { "aria-pressed": String(given[name] === Number(key)), disabled: !pending, onclick: () => aspect(name, Number(key)) },
          el("kbd", {}, key), text)))),
  el("div", { class: "row small muted" }, pending ? "Enter sends the verdict" : "first which one is better, then these"));
}

function aspect(name, value) {
  pending.aspects[name] = value;
  draw();
  mark();
}

function mark() {
  for (const box of main.querySelectorAll(".pick")) {
    const i = Number(box.dataset.place);
    box.classList.toggle("chosen", best === i || (pending && { left: 0, right: 1 }[pending.choice] === i));
  }
}

function choose(answer) {
  if (!current() || busy) return;
  answer.ms = Math.round(performance.now() - shownAt);
  if (state.words) answer.wrong_words = marks;
  if (state.aspects.length && answer.choice !== "skip") {
    pending = { ...answer, aspects: pending?.aspects ?? {} };
    draw();
    mark();
  } else {
    submit(answer);
  }
}

function ranked(i) {
  if (best === null || best === i) {
    best = best === i ? null : i;
    mark();
  } else {
    submit({ best, worst: i, ms: Math.round(performance.now() - shownAt) });
  }
}

async function submit(answer) {
  if (busy) return;
  busy = true;
  const found = await tried(() => ask("label-verdict", { ...ids(), visit: current().id, ...answer }));
  busy = false;
  if (found) {
    warn("");
    await show(found);
  }
}

async function undo() {
  if (busy || !state) return;
  busy = true;
  const found = await tried(() => ask("label-undo", ids()));
  busy = false;
  if (found) {
    if (found.undone) warn(""); else notice("There is nothing to take back.");
    await show(found);
  }
}

function enlarge() {
  if (current()) zoom(current().pictures.map(pictureUrl));
}

function help() {
  const keys = [["← →", "the left or the right picture is better"], ["↓", "tie"], ["B", "both are bad"], ["S", "skip: say nothing"],
    ["U", "undo, as often as you like"], ["Z", "full size; hold Space there to swap"], ["1 2 3", "an aspect: left, equal, right"],
    ["1 … 9", "of more than two pictures: the best, then the worst"], ["Enter", "send a verdict with aspects"], ["?", "this help"]];
  dialog("Keys",
    el("div", { class: "keys" }, keys.flatMap(([key, text]) => [el("kbd", {}, key), el("span", {}, text)])),
    el("p", { class: "muted" }, "Judge by the prompt first, then by how the picture looks. Take a tie when you cannot tell. " +
      "Some pairs come back with their sides exchanged. A verdict is saved before the next pair appears."));
}

async function session() {
  const [tasks, found] = await Promise.all([tried(() => ask("label-tasks")), tried(() => ask("label-summary", ids()))]);
  if (!tasks || !found) return;
  const name = el("input", { value: place.annotator, "aria-label": "Annotator" });
  const task = select(Object.fromEntries(tasks.tasks.map((name) => [name, name])), place.task);
  const merge = select({ majority: "majority of all annotators", annotators: "one row for each annotator" });
  const told = el("p", { class: "muted", id: "exported" });
  const open = dialog("Labels",
    el("div", { class: "fields" }, field("Annotator", name), field("Folder of labels", task)),
    el("div", { class: "row" }, el("button", { onclick: async () => {
      place.annotator = name.value.trim();
      place.task = task.value;
      const next = await tried(() => ask("label-next", ids()));
      if (next) { open.close(); warn(""); await show(next); }
    } }, "Go on as this annotator"),
    el("button", { id: "another", onclick: () => { open.close(); begin(tasks); } }, "Judge other pictures")),
    ...summary(found),
    el("h3", {}, "Export to Pick-a-Pic's columns"),
    el("div", { class: "row" }, el("div", {}, merge), el("button", { class: "primary", id: "export", onclick: async () => {
      const done = await tried(() => ask("label-export", { task: place.task, merge: merge.value }));
      if (done) told.textContent = `${done.text}, in ${done.folder}/`;
    } }, "Export")), told);
}

function summary(found) {
  const people = Object.entries(found.annotators);
  const rows = people.map(([name, of]) => [name, of.better, of.tie, of.bad, of.skip, of.hasty,
    of.repeats ? `${of.agreed} of ${of.repeats}` : "–", of.left ? `${percent(of.left.rate)} (${between(of.left.interval)})` : "–"]);
  const together = Object.entries(found.together).map(([name, figure]) =>
    [{ percent: "equal answers", alpha: "Krippendorff's α", kappa: "Cohen's κ" }[name],
      figure.value === null ? "–" : figure.value.toFixed(3),
      figure.interval[0] === null ? "–" : `${figure.interval[0].toFixed(3)} to ${figure.interval[1].toFixed(3)}`, figure.count]);
  return [
    el("p", { class: "muted" }, `${found.rule}. ${found.units} to judge.`),
    ...(rows.length ? [table(["annotator", "better", "tie", "both bad", "skipped", "under 0.3 s", "same again", "left wins"], rows)] : []),
    ...(together.length ? [table(["agreement", "value", "95% interval", "shared"], together)] : []),
    ...(found.models.length ? [table(["drawn by", "wins", "95% interval", "pairs"],
      found.models.map((of) => [of.model, percent(of.rate), between(of.interval), of.count]))] : []),
    ...people.flatMap(([name, of]) => of.circles.map((circle) =>
      el("p", { class: "alarm" }, `${name} contradicts themselves: “${circle.prompt}”, pictures ${circle.pictures.map((of) => of.join(", ")).join("; ")}`))),
  ];
}

/** A name that no folder of labels has. */
function freeName(tasks) {
  let name = tasks.first;
  for (let number = 2; tasks.tasks.includes(name); number += 1) name = `${tasks.first}-${number}`;
  return name;
}

async function begin(tasks) {
  state = null;
  delete document.body.dataset.visit;
  tools.replaceChildren();
  const [known, fresh] = await Promise.all([tried(() => ask("data-sources")), tried(() => ask("fresh-state"))]);
  const offered = known ? [...known.tables, ...known.folders] : [];
  const name = el("input", { value: freeName(tasks) });
  const from = select({ there: "a table of pairs, or folders of pictures", fresh: "pictures that are drawn now" });
  const kind = select({ pairs: "pairs", "best-worst": "best and worst of many", swiss: "Swiss tournament" });
  const order = select({ random: "random", active: "active: what scorers disagree about", file: "as in the file" });
  const holdout = el("input", { type: "number", min: "0", max: "0.9", step: "0.05", value: "0" });
  const asked = el("input", { placeholder: "composition light" });
  const sources = el("textarea", { rows: 3, placeholder: "pairs\nor two folders, one a line" });
  const sides = el("textarea", { rows: 3, placeholder: "base\nruns/dpo\nbase@guidance_scale=8" });
  const { inputs, values } = drawingInputs(1);
  const job = el("div", { class: "job", "aria-live": "polite", id: "job" });
  const there = [field("Files or folders, one a line", sources), offered.length ? el("div", { class: "row" }, offered.slice(0, 12).map((one) =>
    el("button", { onclick: () => { sources.value = [...lines(sources.value), one].join("\n"); } }, one))) : null].filter(Boolean);
  const drawn = [promptsField(inputs.prompts), field("Models, one a line", sides),
    el("p", { class: "small muted" }, "Several models are judged against each other on the same noise, the pictures of one model against each other."),
    el("div", { class: "fields" }, field("Pictures of each prompt", inputs.count), field("First seed", inputs.seed), field("Steps", inputs.steps),
      field("Guidance scale", inputs.guidance_scale), field("Base model", inputs.model))];
  const chosen = el("div", { class: "stack" }, there);
  from.addEventListener("change", () => chosen.replaceChildren(...(from.value === "fresh" ? drawn : there)));
  const settings = () => ({ name: name.value.trim(), kind: kind.value, order: order.value, holdout: Number(holdout.value),
    aspects: asked.value.split(/[\s,]+/).filter(Boolean) });
  place.drawing = (news) => {
    showJob(news, job, () => tried(() => ask("fresh-cancel")));
    if (news?.state === "done" && job.isConnected) openTask(news.name);
  };
  main.replaceChildren(el("div", { class: "begin" },
    el("div", { class: "stack" }, el("h1", {}, "What shall be judged?"),
      el("p", { class: "muted" }, "Pictures of the same prompts. Sides are blind: nothing on the page tells which model drew what.")),
    field("From", from), chosen,
    el("div", { class: "fields" }, field("Folder of labels", name), field("How", kind), field("Order", order),
      field("Held out for testing (share)", holdout), field("Also ask about", asked)),
    el("div", { class: "row" }, el("button", { class: "primary", id: "begin", onclick: async () => {
      warn("");
      if (from.value === "fresh") {
        const found = await tried(() => ask("fresh-start", { ...settings(), ...values(), columns: lines(sides.value) }));
        if (found) place.drawing(found.job);
      } else {
        const made = await tried(() => ask("label-begin", { ...settings(), sources: lines(sources.value) }));
        if (made) await openTask(made.name);
      }
    } }, "Begin"), job)));
  if (fresh?.job?.state === "running") {
    from.value = "fresh";
    chosen.replaceChildren(...drawn);
    place.drawing(fresh.job);
  }
}

/** Go on with a folder of labels. */
async function openTask(name) {
  place.task = name;
  const found = await tried(() => ask("label-next", ids()));
  if (found) { warn(""); await show(found); }
}

async function start() {
  const tasks = await tried(() => ask("label-tasks"));
  if (!tasks) return;
  place.annotator ??= new URLSearchParams(location.search).get("annotator") ?? tasks.annotator;
  const wanted = new URLSearchParams(location.search).get("task") ?? tasks.first;
  if (!tasks.tasks.includes(wanted)) {
    await begin(tasks);
    return;
  }
  await openTask(wanted);
}

const KEYS = { ArrowLeft: { choice: "left" }, ArrowRight: { choice: "right" }, ArrowDown: { choice: "tie" }, b: { choice: "bad" },
  s: { choice: "skip" } };

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !state) return;
  if (document.querySelector("dialog[open]") || event.target.closest("input, textarea, select")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const many = (current()?.pictures.length ?? 0) > 2;
  if (KEYS[key] && !(many && ["ArrowLeft", "ArrowRight"].includes(key))) choose({ ...KEYS[key] });
  else if (key === "u") undo();
  else if (key === "z") enlarge();
  else if (key === "?") help();
  else if (many && /^[1-9]$/.test(key) && Number(key) <= current().pictures.length) ranked(Number(key) - 1);
  else if (pending && /^[123]$/.test(key)) {
    const next = state.aspects.find((name) => !(name in pending.aspects)) ?? state.aspects.at(-1);
    aspect(next, Number(key));
  } else if (pending && key === "Enter") submit(pending);
  else return;
  event.preventDefault();
});

listen((event) => { if (event.kind === "fresh") place.drawing?.(event.job); });
start();
