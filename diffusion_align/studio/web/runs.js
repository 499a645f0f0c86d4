// Runs: what is training, how it goes, and two runs beside each other.
import { ask, dialog, el, field, listen, main, percent, picture, pictureUrl, root, select, table, tried } from "./common.js";
import { chart, smoothed } from "./chart.js";
import { zoom } from "./zoom.js";

const FIRST = ["eval/win_rate", "loss", "eval/loss", "implicit_accuracy", "reward", "eval/reward", "grad_norm"];
const list = el("div", { class: "list", id: "runs" });
const side = el("section", { class: "stack", id: "run", "aria-live": "polite" });
const place = { runs: [], run: null, other: "", smoothing: 1, open: false };

const duration = (seconds) => (seconds >= 3600 ? `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min` :
  seconds >= 60 ? `${Math.floor(seconds / 60)} min` : `${Math.round(seconds)} s`);
const steps = (run) => (run.steps ? `${run.step.toLocaleString()} of ${Number(run.steps).toLocaleString()} steps` : `${run.step.toLocaleString()} steps`);

async function refresh() {
  const found = await tried(() => ask("runs-list"));
  if (!found) return;
  place.runs = found.runs;
  if (!found.runs.length) {
    main.replaceChildren(el("div", { class: "finished" }, el("h1", {}, "No run here yet"),
      el("p", { class: "muted" }, "Folders with config.yaml and metrics.jsonl are shown, in the studio's folder and in --data."),
      el("p", { class: "mono" }, "diffusion-align train dpo --config scenes_dpo --output-dir runs/dpo")));
    return;
  }
  list.replaceChildren(...found.runs.map((run) => el("button", { "aria-current": String(run.id === place.run),
    "data-run": run.name, onclick: () => show(run.id) },
    el("span", { class: `dot${run.running ? " running" : ""}`, title: run.running ? "running" : "ended" }),
    el("span", {}, run.name), el("span", { class: "muted number" }, run.win_rate === null ? "" : percent(run.win_rate)),
    el("span", { class: "under" }, `${run.method ?? "?"} · ${steps(run)} · ${duration(run.seconds)}${run.alarms ? " · alarm" : ""}`))));
  if (!list.isConnected) main.replaceChildren(el("div", { class: "runs" }, el("div", { class: "stack" }, el("h1", {}, "Runs"), list), side));
  if (!place.run) await show(found.runs[0].id);
}

async function show(id) {
  place.run = id;
  for (const [i, button] of [...list.children].entries()) button.setAttribute("aria-current", String(place.runs[i].id === id));
  const run = await tried(() => ask("runs-detail", { run: id }));
  if (!run || place.run !== id) return;
  const both = place.other && place.other !== id ? await tried(() => ask("runs-compare", { run: id, other: place.other })) : null;
  const others = select(Object.fromEntries([["", "nothing"], ...place.runs.filter((one) => one.id !== id).map((one) => [one.id, one.name])]), place.other);
  others.addEventListener("change", () => { place.other = others.value; show(id); });
  const smooth = el("input", { type: "range", min: "1", max: "50", value: String(place.smoothing) });
  const charts = el("div", { class: "charts" }), further = el("div", { class: "charts" });
  const draw = () => drawCharts(run, both, charts, further);
  smooth.addEventListener("input", () => { place.smoothing = Number(smooth.value); draw(); });
  const all = el("details", { open: place.open }, el("summary", { class: "muted" }, "All metrics"), further);
  all.addEventListener("toggle", () => { place.open = all.open; });
  side.replaceChildren(...[
    el("div", { class: "stack" }, el("h2", {}, run.name),
      el("p", { class: "muted number" }, [run.running ? "running" : "ended", run.method, steps(run), duration(run.seconds),
        run.win_rate === null ? null : `last win rate ${percent(run.win_rate)}`].filter(Boolean).join(" · "))),
    ...run.alarms.map((alarm) => el("p", { class: "alarm" }, `Alarm: ${alarm.name}, since step ${alarm.step}.${run.report ? " The report says more." : ""}`)),
    el("div", { class: "row" }, run.report ? el("button", { id: "report", onclick: () => showReport(run) }, "Report") : null,
      el("span", { class: "muted" }, run.checkpoints.length ? `Checkpoints: ${run.checkpoints.map((name) => name.replace("checkpoint-", "")).join(", ")}` : "No checkpoint.")),
    run.damaged ? el("p", { class: "muted" }, `${run.damaged} damaged lines of metrics.jsonl are left out.`) : null,
    el("div", { class: "fields" }, field("Beside", others), field("Smoothing", smooth)),
    both ? el("p", {}, el("b", { class: "k0" }, run.name), "  and  ",
      el("b", { class: "k1" }, place.runs.find((one) => one.id === place.other)?.name ?? "")) : null,
    charts, all,
    ...strip(run, both),
    ...(both ? [el("h3", {}, `Settings that differ (${both.same} are equal)`),
      both.differences.length ? table(["setting", run.name, "the other"], both.differences.map((one) => [one.name, ...one.values])) :
        el("p", { class: "muted" }, "None.")] : []),
    el("details", {}, el("summary", { class: "muted" }, "Settings and versions"),
      el("div", { class: "stack" },
        el("p", { class: "muted" }, "Further scalars: tensorboard --logdir on the folder."),
        table(["setting", "value"], run.config.map((one) => [one.name, one.value])),
        table(["version of", ""], [...Object.entries(run.versions), ["git commit", run.commit ?? "–"]]))),
  ].filter(Boolean));
  draw();
}

/** The run's own page, without scripts and without a part in this one. */
function showReport(run) {
  const frame = el("iframe", { sandbox: "", title: `Report of ${run.name}`, src: `${root}/report/${run.id}` });
  dialog(`Report of ${run.name}`, frame).classList.add("wide");
}

function drawCharts(run, both, charts, further) {
  const others = both ? both.curves[1] : {};
  const names = [...new Set([...Object.keys(run.curves), ...Object.keys(others)])].sort();
  const made = (name) => {
    const lines = [run.curves[name] ?? [], others[name] ?? []].filter((line) => line.length).map((line) => smoothed(line, place.smoothing));
    const marks = name === "loss" && run.preference ? [[Math.LN2, "log 2"]] : name === "eval/win_rate" ? [[0.5, "even"]] : [];
    return el("figure", { class: "chart", "data-metric": name }, el("figcaption", { class: "small" }, name), chart(name, lines, marks));
  };
  charts.replaceChildren(...FIRST.filter((name) => names.includes(name)).slice(0, 6).map(made));
  further.replaceChildren(...names.filter((name) => !FIRST.includes(name)).map(made));
}

function strip(run, both) {
  const rows = both ? both.samples.map(({ step, pictures }) => ({ step, pictures })) : run.samples.map((one) => ({ step: one.step, pictures: [one.picture] }));
  if (!rows.length) return [];
  return [el("h3", {}, both ? "Validation pictures at equal steps" : "Validation pictures"),
    el("div", { class: "strip" }, rows.map(({ step, pictures }) => el("figure", {},
      pictures.map((id) => el("button", { class: "plain", "aria-label": `Step ${step}, full size`, onclick: () => zoom(pictures.map(pictureUrl)) }, picture(id))),
      el("figcaption", { class: "number" }, `step ${step.toLocaleString()}`))))];
}

let waiting = 0;
listen((event) => {
  if (event.kind !== "run") return;
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    await refresh();
    if (event.run === place.run) await show(place.run);
  }, 400);
});
setInterval(refresh, 15000);
refresh();
