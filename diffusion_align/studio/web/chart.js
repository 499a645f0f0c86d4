// Small line charts as SVG.
const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Running mean over `width` points. */
export function smoothed(points, width) {
  if (width <= 1) return points;
  const found = [];
  let sum = 0;
  points.forEach(([step, value], i) => {
    sum += value;
    if (i >= width) sum -= points[i - width][1];
    found.push([step, sum / Math.min(i + 1, width)]);
  });
  return found;
}

const number = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) :
  String(Number(value.toPrecision(3))));

/** A chart of one metric: `lines` are lists of [step, value], the first in the first colour; `marks` horizontal lines. */
export function chart(title, lines, marks = []) {
  const width = 340, height = 170, left = 46, right = 8, top = 10, bottom = 22;
  const points = lines.flat();
  const steps = points.map(([step]) => step), values = points.map(([, value]) => value).concat(marks.map(([value]) => value));
  let [x0, x1, y0, y1] = [Math.min(...steps), Math.max(...steps), Math.min(...values), Math.max(...values)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { y0 -= Math.abs(y0) / 10 || 1; y1 += Math.abs(y1) / 10 || 1; }
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => top + ((y1 - value) / (y1 - y0)) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  svg.append(shape("text", { x: left, y: height - 6 }, number(x0)), shape("text", { x: width - right, y: height - 6, "text-anchor": "end" }, number(x1)));
  for (const [value, text] of marks) {
    svg.append(shape("line", { class: "mark", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      shape("text", { x: width - right, y: y(value) - 4, "text-anchor": "end" }, text));
  }
  lines.forEach((line, i) => {
    if (line.length === 1) svg.append(shape("circle", { class: `c${i}`, cx: x(line[0][0]), cy: y(line[0][1]), r: 2.5 }));
    else svg.append(shape("polyline", { class: `line c${i}`, points: line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  });
  return svg;
}
