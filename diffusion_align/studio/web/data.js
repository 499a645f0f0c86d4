// Data: tables of pairs. Only what is on the screen is in the page.
import { ask, dialog, el, field, main, picture, pictureUrl, select, tried, warn } from "./common.js";
import { zoom } from "./zoom.js";

const PAGE = 60, TILE = 292, HEIGHT = 196;
const place = { table: "", filters: {}, pages: new Map(), asked: new Set(), count: 0, tiles: new Map(), version: 0 };
const grid = el("div", { class: "grid", id: "grid" });
const counts = el("dl", { class: "counts" });
const shown = el("p", { class: "muted number", id: "shown" });

function columns() {
  return Math.max(1, Math.floor(grid.clientWidth / TILE));
}

async function load(number) {
  if (place.pages.has(number) || place.asked.has(number)) return;
  place.asked.add(number);
  const version = place.version;
  const found = await tried(() => ask("data-page", { table: place.table, offset: number * PAGE, ...place.filters }));
  place.asked.delete(number);
  if (!found || version !== place.version) return;
  place.pages.set(number, found.rows);
  if (place.pages.size > 12) place.pages.delete(place.pages.keys().next().value);
  place.count = found.count;
  shown.textContent = found.count === found.total ? `${found.total.toLocaleString()} pairs` :
    `${found.count.toLocaleString()} of ${found.total.toLocaleString()} pairs`;
  draw();
}

function draw() {
  const across = columns();
  grid.style.height = `${Math.ceil(place.count / across) * HEIGHT}px`;
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(top / HEIGHT) - 2) * across;
  const last = Math.min(place.count, (Math.ceil((top + innerHeight) / HEIGHT) + 2) * across);
  for (const [index, tile] of place.tiles) {
    if (index < first || index >= last) {
      tile.remove();
      place.tiles.delete(index);
    }
  }
  const width = Math.floor(grid.clientWidth / across);
  for (let index = first; index < last; index += 1) {
    const row = place.pages.get(Math.floor(index / PAGE))?.[index % PAGE];
    if (!row) {
      load(Math.floor(index / PAGE));
      continue;
    }
    let tile = place.tiles.get(index);
    if (!tile) {
      tile = made(row);
      place.tiles.set(index, tile);
      grid.append(tile);
    }
    Object.assign(tile.style, { width: `${width}px`, height: `${HEIGHT}px`,
      transform: `translate(${(index % across) * width}px, ${Math.floor(index / across) * HEIGHT}px)` });
  }
}

const told = (row) => (row.label === null ? "no label" : row.bad ? "both bad" : row.label === 0.5 ? "tie" : row.label > 0.5 ? "first" : "second");

function made(row) {
  const winner = row.label === null || row.label === 0.5 ? -1 : row.label > 0.5 ? 0 : 1;
  const tile = el("article", { class: `tile${row.excluded ? " out" : ""}`, "data-row": String(row.row) },
    el("button", { class: "two plain", "aria-label": `Pair ${row.row}`, onclick: () => open(row, tile) },
      row.small.map((id, side) => el("span", { class: `half${winner === side ? " won" : ""}` }, picture(id)))),
    el("div", { class: "line" }, el("span", { title: row.prompt }, row.prompt), told(row)));
  return tile;
}

function open(row, tile) {
  const facts = [["prompt", row.prompt], ["label", told(row)], ["drawn by", row.models.map((name) => name ?? "–").join("  ·  ")],
    ["judged by", row.annotator ?? "–"], ["votes", row.votes[0] === null ? "–" : row.votes.join(" : ")],
    ...Object.entries(row.scores).map(([name, both]) => [name, both.map((value) => value?.toFixed(3) ?? "–").join("  ·  ")]),
    ["where", row.where]];
  const exclude = el("button", { onclick: async () => {
    const found = await tried(() => ask("data-exclude", { table: place.table, row: row.row }));
    if (!found) return;
    row.excluded = found.excluded;
    tile.classList.toggle("out", found.excluded);
    exclude.textContent = found.excluded ? "Take off the exclusion list" : "Exclude";
  } }, row.excluded ? "Take off the exclusion list" : "Exclude");
  dialog(`Pair ${row.row}`,
    el("div", { class: "stage pair" }, row.large.map((id) => el("span", { class: "pick" }, el("span", { class: "frame" }, picture(id))))),
    el("div", { class: "row" }, exclude, el("button", { onclick: () => zoom(row.large.map(pictureUrl)) }, "Full size")),
    el("div", { class: "keys" }, facts.flatMap(([name, value]) => [el("span", { class: "muted" }, name), el("span", {}, value)])));
}

function again() {
  place.version += 1;
  place.pages.clear();
  place.asked.clear();
  for (const tile of place.tiles.values()) tile.remove();
  place.tiles.clear();
  place.count = 0;
  load(0);
}

async function start() {
  const found = await tried(() => ask("data-sources"));
  if (!found) return;
  if (!found.tables.length) {
    main.replaceChildren(el("div", { class: "finished" }, el("h1", {}, "No table of pairs here"),
      el("p", { class: "muted" }, "Parquet files in Pick-a-Pic's columns are shown: what annotate writes, what Label exports. " +
        "They are looked for in the studio's folder and in --data.")));
    return;
  }
  const wanted = new URLSearchParams(location.search).get("table");
  place.table = found.tables.includes(wanted) ? wanted : found.tables[0];
  const table = select(Object.fromEntries(found.tables.map((name) => [name, name === "." ? "this folder" : name])), place.table);
  table.addEventListener("change", () => { location.search = `?${new URLSearchParams({ table: table.value })}`; });
  const filters = el("div", { class: "filters" }), details = el("div", { class: "keys" });
  main.replaceChildren(el("div", { class: "stack" },
    el("div", { class: "row" }, el("h1", {}, "Data"), el("div", {}, table)),
    counts,
    el("details", {}, el("summary", { class: "muted" }, "Sizes and repeated prompts"), details),
    filters, shown, grid));
  document.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(main);
  await load(0);
  const facts = await tried(() => ask("data-counts", { table: place.table }));
  if (facts) describe(facts, filters, details);
}

function describe(facts, filters, details) {
  const inputs = {
    text: el("input", { type: "search", placeholder: "words" }),
    label: select({ "": "any", first: "first is better", second: "second is better", tie: "tie", bad: "both bad", unlabelled: "none" }),
    annotator: select(Object.fromEntries([["", "anybody"], ...facts.annotators.map((name) => [name, name])])),
    agreement: el("input", { type: "number", min: "0.5", max: "1", step: "0.05", placeholder: "0.5 to 1" }),
    gap: el("input", { type: "number", min: "0", step: "0.1", placeholder: facts.scorers[0] ?? "no scores", disabled: !facts.scorers.length }),
    show: select({ "": "all", duplicates: "same pictures twice", corrupt: "cannot be read", excluded: "excluded" }),
  };
  const filtered = () => {
    place.filters = Object.fromEntries(Object.entries(inputs).filter(([name, input]) => name !== "show" && input.value !== "")
      .map(([name, input]) => [name, input.value]));
    if (inputs.show.value) place.filters[inputs.show.value] = true;
    warn("");
    again();
  };
  let waiting = 0;
  for (const input of Object.values(inputs)) {
    input.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filtered, 200); });
  }
  const labels = { first: "first better", second: "second better", tie: "ties", bad: "both bad", unlabelled: "no label" };
  counts.replaceChildren(...[["pairs", facts.rows], ["prompts", facts.prompts], ...Object.entries(facts.labels).map(([name, n]) => [labels[name], n]),
    ["same pictures", facts.duplicates], ["excluded", facts.excluded]].map(([name, n]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, Number(n).toLocaleString()))));
  details.replaceChildren(
    ...facts.sizes.flatMap(([size, n]) => [el("span", { class: "number" }, `${n} of ${2 * facts.measured}`), el("span", {}, size)]),
    ...facts.repeated.flatMap(([text, n]) => [el("span", { class: "number" }, `${n} ×`), el("span", {}, text)]));
  filters.replaceChildren(field("Prompt", inputs.text), field("Label", inputs.label), field("Judged by", inputs.annotator),
    field("Agreement at least", inputs.agreement), field("Score gap at most", inputs.gap), field("Show", inputs.show));
}

start();
