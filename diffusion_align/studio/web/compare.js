// Compare: rows share their noise, columns are models. Pictures appear as they are drawn.
import { ask, el, field, listen, main, notice, picture, pictureUrl, tried, warn } from "./common.js";
import { chart } from "./chart.js";
import { drawingInputs, promptsField, showJob } from "./drawing.js";
import { zoom } from "./zoom.js";

const place = { board: null, job: null, strengths: {}, runs: [], shape: "" };
const progress = el("div", { class: "job", "aria-live": "polite", id: "job" });
const boardAt = el("section", { class: "stack", id: "board" });
const sides = el("div", { class: "columns" });
const { inputs, values } = drawingInputs(2);
inputs.scorers = el("input", { placeholder: "pickscore aesthetic" });
const key = (column, row, strength) => `${column}/${row}/${Number(strength.toFixed(2))}`;

function column(text = "") {
  const input = el("input", { value: text, list: "known", "aria-label": "Column", placeholder: "base, runs/dpo, lora.safetensors, name=…@guidance=dynamic" });
  const line = el("div", { class: "column-line" }, input,
    el("button", { class: "plain", "aria-label": "Take this column away", onclick: () => { if (sides.children.length > 1) line.remove(); } }, "Remove"));
  sides.append(line);
}

async function draw() {
  warn("");
  const found = await tried(() => ask("compare-start", {
    columns: [...sides.querySelectorAll("input")].map((input) => input.value.trim()).filter(Boolean),
    ...values(), scorers: inputs.scorers.value.split(/[\s,]+/).filter(Boolean),
  }));
  if (found) {
    place.strengths = {};
    place.shape = "";
    take(found);
  }
}

function take(found) {
  place.board = found.board;
  place.job = found.job;
  showProgress();
  showBoard();
}

const showProgress = () => showJob(place.job, progress, () => tried(() => ask("compare-cancel")));

/** The drawn strength that is nearest to the one that is wanted. */
function nearest(column, row, wanted) {
  let found = null;
  for (const name of Object.keys(place.board.cells)) {
    const [c, r, strength] = name.split("/").map(Number);
    if (c === column && r === row && (found === null || Math.abs(strength - wanted) < Math.abs(found - wanted))) found = strength;
  }
  return found;
}

const shownAt = (column, row) => nearest(column, row, place.strengths[column] ?? 1);

function showBoard() {
  const board = place.board;
  if (!board) { boardAt.replaceChildren(); return; }
  // What is under the user's hands stays: only new cells are drawn while the board is the same.
  const shape = JSON.stringify([board.names, board.rows, board.trained, Object.keys(board.commands)]);
  if (shape === place.shape) {
    board.names.forEach((_, column) => refreshCells(column));
    buttons();
    return;
  }
  place.shape = shape;
  const across = board.names.length;
  const grid = el("div", { class: "board" });
  grid.style.gridTemplateColumns = `repeat(${across}, minmax(min(${across > 3 ? 150 : across > 1 ? 104 : 240}px, 100%), 1fr))`;
  board.names.forEach((name, column) => grid.append(head(name, column)));
  board.rows.forEach((row, number) => {
    if (number === 0 || board.rows[number - 1].prompt !== row.prompt) {
      const text = el("p", { class: "of-rows" }, row.prompt);
      text.style.gridColumn = "1 / -1";
      grid.append(text);
    }
    board.names.forEach((name, column) => grid.append(cell(column, number, row)));
  });
  boardAt.replaceChildren(grid, el("div", { class: "row" },
    el("button", { id: "to-label", onclick: toLabel }, "Send to Label"),
    el("button", { id: "save-grid", onclick: async () => {
      const found = await tried(() => ask("compare-grid"));
      if (found) notice(`The grid is in ${found.file}`);
    } }, "Save grid")));
  buttons();
}

function buttons() {
  const board = place.board;
  const whole = board.names.every((_, column) => board.rows.every((_, row) => board.cells[key(column, row, 1)]));
  document.getElementById("to-label").disabled = !whole || board.names.length < 2;
  document.getElementById("save-grid").disabled = !whole;
}

function head(name, column) {
  const board = place.board;
  const made = el("div", { class: "stack", "data-column": String(column) }, el("span", { class: "head" }, name));
  if (board.commands[column]) {
    made.append(el("div", {}, el("button", { onclick: async () => {
      try { await navigator.clipboard.writeText(board.commands[column]); notice("The command is copied."); } catch { notice(board.commands[column]); }
    }, title: board.commands[column], class: "copy" }, "Copy command")));
  }
  if (board.trained[column]) {
    const value = place.strengths[column] ?? 1;
    const said = el("span", { class: "small muted number" }, value.toFixed(2));
    const slider = el("input", { type: "range", min: "0", max: "2", step: "0.05", value: String(value), "aria-label": `Strength of ${name}` });
    slider.addEventListener("input", () => {
      place.strengths[column] = Number(slider.value);
      said.textContent = Number(slider.value).toFixed(2);
      refreshCells(column);
    });
    let waiting = 0;
    slider.addEventListener("change", () => {
      clearTimeout(waiting);
      waiting = setTimeout(async () => {
        const found = await tried(() => ask("compare-strength", { column, strength: Number(slider.value) }));
        if (found) { place.board = found.board; place.job = found.job; showProgress(); refreshCells(column); }
      }, 250);
    });
    made.append(el("label", { class: "field" }, el("span", { class: "row" }, "strength", said), slider));
  }
  return made;
}

function cell(column, number, row) {
  const strength = shownAt(column, number);
  const found = strength === null ? null : place.board.cells[key(column, number, strength)];
  const wanted = place.strengths[column] ?? 1;
  const facts = [`seed ${row.seed}`];
  if (found) {
    if (strength !== wanted) facts.push(`at ${strength}`);
    if (found.candidates && found.scales) facts.push(`scale ${Math.min(...found.scales)} to ${Math.max(...found.scales)}`);
    if (found.nfe) facts.push(`${found.nfe} calls`);
    for (const [name, score] of Object.entries(found.scores ?? {})) facts.push(`${name} ${score.toPrecision(4)}`);
  }
  return el("div", { class: "cell", "data-cell": `${column}/${number}`, "data-strength": strength === null ? "" : String(strength) },
    el("button", { class: "frame", "aria-label": `${place.board.names[column]}, seed ${row.seed}, full size`, disabled: !found, onclick: () => enlarge(number) },
      found ? picture(found.picture) : el("span", { class: "muted small" }, "…")),
    el("div", { class: "facts number" }, facts.map((text) => el("span", {}, text))),
    found?.candidates && found.scales ? plot(found) : null);
}

function plot(found) {
  const marks = found.candidates.map((scale) => [scale, String(scale)]);
  return el("div", { class: "chart" }, chart("guidance scale by step", [found.scales.map((scale, step) => [step + 1, scale])], marks));
}

function refreshCells(column) {
  place.board.rows.forEach((row, number) => {
    const old = boardAt.querySelector(`[data-cell="${column}/${number}"]`);
    if (old && old.dataset.strength !== String(shownAt(column, number) ?? "")) old.replaceWith(cell(column, number, row));
  });
}

function enlarge(number) {
  const ids = place.board.names.map((_, column) => place.board.cells[key(column, number, shownAt(column, number) ?? -1)]?.picture).filter(Boolean);
  zoom(ids.map(pictureUrl));
}

async function toLabel() {
  const found = await tried(() => ask("compare-label"));
  if (found) location.href = `${document.documentElement.dataset.root}/label?${new URLSearchParams({ task: found.name })}`;
}

async function start() {
  const runs = (await tried(() => ask("runs-list")))?.runs ?? [];
  const found = await tried(() => ask("compare-state"));
  main.replaceChildren(el("div", { class: "stack" },
    el("h1", {}, "Compare"),
    el("datalist", { id: "known" }, ["base", ...runs.map((run) => run.name)].map((value) => el("option", { value }))),
    promptsField(inputs.prompts),
    el("div", { class: "stack" }, el("span", { class: "small muted" }, "Columns"), sides,
      el("div", {}, el("button", { onclick: () => { if (sides.children.length < 6) column(); } }, "Add a column"))),
    el("div", { class: "fields" }, field("First seed", inputs.seed), field("Pictures of each prompt", inputs.count), field("Steps", inputs.steps),
      field("Guidance scale", inputs.guidance_scale)),
    el("details", {}, el("summary", { class: "muted" }, "Base model and scorers"),
      el("div", { class: "fields" }, field("Base model", inputs.model), field("Scorers", inputs.scorers))),
    el("div", { class: "row" }, el("button", { class: "primary", id: "draw", onclick: draw }, "Draw"), progress),
    boardAt));
  const board = found?.board;
  if (board) {
    for (const name of ["seed", "count", "steps", "guidance_scale", "model"]) inputs[name].value = board[name];
    inputs.prompts.value = board.prompts.join("\n");
    inputs.scorers.value = board.scorers.join(" ");
    board.columns.forEach(column);
    take(found);
  } else {
    ["base", ...runs.slice(0, 1).map((run) => run.name)].forEach(column);
  }
}

let waiting = false;
listen(async (event) => {
  if (event.kind !== "compare") return;
  place.job = event.job;
  showProgress();
  if (event.board && !waiting) {
    waiting = true;
    const found = await tried(() => ask("compare-state"));
    waiting = false;
    if (found) { place.board = found.board; place.job = found.job; showProgress(); showBoard(); }
  }
});
start();
