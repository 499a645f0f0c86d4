// What every page shares: asking the server, building elements, the banner.
const page = document.documentElement.dataset;
export const root = page.root;

export class Refused extends Error {}

/** Ask for an action; resolves to its answer, or throws Refused with what the server said. */
export async function ask(name, body = {}) {
  let answer;
  try {
    answer = await fetch(`${root}/api/${name}`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-studio-token": page.token },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Refused("The studio does not answer. Is it still running?");
  }
  const text = await answer.text();
  if (!answer.ok) {
    let said = text;
    try { said = JSON.parse(text).error ?? text; } catch { /* plain text */ }
    throw new Refused(said);
  }
  return JSON.parse(text);
}

/** An element. Texts are text nodes, so nothing in a prompt is ever markup. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export const main = document.getElementById("main");
export const tools = document.getElementById("tools");

const banner = document.getElementById("banner");
export function warn(text) {
  banner.className = "";
  banner.textContent = text;
  banner.hidden = !text;
}
export function notice(text) {
  warn(text);
  banner.className = "notice";
}

/** Run an action of the user; what goes wrong is shown. */
export async function tried(action) {
  try {
    const found = await action();
    return found;
  } catch (error) {
    warn(error instanceof Refused ? error.message : String(error));
    return undefined;
  }
}

export const pictureUrl = (id) => `${root}/picture/${id}`;

/** An image that shows what is wrong in its place if it cannot be loaded. */
export function picture(id, alt = "") {
  const image = el("img", { alt, decoding: "async" });
  image.src = pictureUrl(id);
  image.addEventListener("error", async () => {
    const said = await fetch(image.src).then((answer) => answer.text(), () => "cannot be loaded");
    image.replaceWith(el("span", { class: "broken" }, said));
  });
  return image;
}

export function field(text, input) {
  return el("label", { class: "field" }, text, input);
}

export function select(options, value) {
  const made = el("select", {}, Object.entries(options).map(([name, text]) => el("option", { value: name }, text)));
  if (value !== undefined) made.value = value;
  return made;
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)}%`);
export const between = (interval) => `${percent(interval[0])} to ${percent(interval[1])}`;

export function table(columns, rows) {
  const numeric = columns.map((_, i) => rows.length > 0 && rows.every((row) => /^[–\d.,%-]+$/.test(String(row[i]))));
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, columns.map((name, i) => el("th", { class: numeric[i] ? "number" : "" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) =>
      el("td", { class: numeric[i] ? "number" : "" }, cell instanceof Node ? cell : String(cell))))))));
}

export function dialog(title, ...content) {
  const made = el("dialog", {}, el("div", { class: "stack" },
    el("div", { class: "row" }, el("h2", {}, title)), ...content,
    el("div", {}, el("button", { onclick: () => made.close() }, "Close ", el("kbd", {}, "Esc")))));
  made.addEventListener("close", () => made.remove());
  document.body.append(made);
  made.showModal();
  return made;
}

/** Events of the server, from now on. */
export function listen(handle) {
  const source = new EventSource(`${root}/api/events`);
  source.addEventListener("message", (event) => handle(JSON.parse(event.data)));
  return source;
}
