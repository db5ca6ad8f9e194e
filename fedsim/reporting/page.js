// What a page does for a reader with JavaScript: values where a plot is pointed at, series that can be hidden, zoom along
// long axes, and tables that can be sorted. It adds to the drawings of `canvas.py`, and loads nothing.
"use strict";
(() => {
const make = (parent, name, attributes = {}, text = "") => {
  const svg = parent instanceof SVGElement;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return parent.appendChild(element);
};
const tip = make(document.body, "div", { id: "tip", role: "status", hidden: "" });
document.documentElement.classList.add("live");

// Legends: an entry shows and hides its series in all plots of the page, and rows with its name in a cell ----------

const entries = [...document.querySelectorAll(".legend input")];
function toggle({ target }) {
  for (const entry of entries.filter((entry) => entry.value === target.value)) {
    entry.checked = target.checked;
    const parts = entry.closest("figure").querySelectorAll(`.panel .series-${entry.dataset.series}`);
    for (const part of parts) part.toggleAttribute("hidden", !entry.checked);
  }
  const out = entries.filter((entry) => !entry.checked).map((entry) => entry.value);
  for (const row of document.querySelectorAll("tbody tr")) {
    row.hidden = [...row.cells].some((cell) => out.includes(cell.textContent));
  }
  tip.hidden = true;
}
for (const entry of entries) {
  entry.addEventListener("change", toggle);
  entry.hidden = !entry.closest("figure").querySelector(`.panel .series-${entry.dataset.series}`);  // drawn as pixels
}

// Plots ---------------------------------------------------------------------------------------------------------

const short = (value) => {  // 20 M, as on the axes
  const [size, unit] = [[1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([size]) => Math.abs(value) >= size) ?? [1, ""];
  return +(value / size).toPrecision(4) + unit;
};

function enliven(panel) {
  const svg = panel.querySelector("svg"), data = JSON.parse(panel.querySelector("script").textContent);
  const inputs = [...panel.closest("figure").querySelectorAll(".legend input")];
  const pointsOf = ({ s, x, y, t }) => x.map((at, k) => ({ input: inputs[s], x: at, y: y[k], text: t[k] }));
  const points = data.series.flatMap(pointsOf);
  if (!points.length && !data.maps.length) return;
  const [left, top, right, bottom] = data.box ?? [-1e9, -1e9, 1e9, 1e9];
  let [from, to] = [left, right];  // what is zoomed to, in the coordinates of the drawing
  const place = (x) => data.x ? left + ((x - from) / (to - from)) * (right - left) : x;
  const back = (x) => from + ((x - left) / (right - left)) * (to - from);
  const value = (x) => data.x[0] + ((x - left) / (right - left)) * (data.x[1] - data.x[0]);
  const whole = (at) => Math.abs(at - Math.round(at)) < 0.02 ? Math.round(at) : at;  // positions are rounded
  const name = (at) => data.names.length ? data.names[Math.round(at)] ?? "" : short(whole(at));
  const seen = () => points.filter(({ input, x }) => input.checked && place(x) > left - 1 && place(x) < right + 1);
  const ring = make(svg, "g", { class: "ring" });
  let current = null;

  function say(lines, x, y) {  // (x, y) in the drawing
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    tip.replaceChildren();
    for (const line of lines.flatMap((line) => line.split("\n"))) make(tip, "div", {}, line);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(at.x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${at.y - height - 14 > 0 ? at.y - height - 14 : at.y + 18}px`;
  }
  function forget() { ring.replaceChildren(); tip.hidden = true; }
  function show(point) {
    current = point;
    const near = (other) => Math.abs(other.x - point.x) < 0.02 && (data.x || Math.abs(other.y - point.y) < 0.2);
    const same = seen().filter(near), x = place(point.x);
    ring.replaceChildren();
    if (data.x) make(ring, "path", { d: `M${x} ${top}V${bottom}` });
    for (const { y } of same) make(ring, "circle", { cx: x, cy: y, r: 5 });
    const lines = same.slice(0, 12).map(({ input, text }) => data.x ? `${input.value}: ${text}` : text);
    if (same.length > 12) lines.push(`and ${same.length - 12} more`);
    say(data.x ? [`${data.name} ${name(value(point.x))}`.trim(), ...lines] : lines, x, point.y);
  }
  function cell(at) {
    for (const { box: [left, top, right, bottom], rows, columns, values } of data.maps) {
      const row = Math.floor(((at.y - top) / (bottom - top)) * rows.length);
      const column = Math.floor(((at.x - left) / (right - left)) * columns.length);
      if (rows[row] && columns[column]) return say([columns[column], rows[row], `${values[row][column]} rows`], at.x, at.y);
    }
    forget();
  }
  function point(at) {
    const far = ({ x, y }) => data.x ? Math.abs(place(x) - at.x) + Math.abs(y - at.y) / 1e4 : Math.hypot(x - at.x, y - at.y);
    const nearest = seen().reduce((best, one) => (best && far(best) <= far(one) ? best : one), null);
    const inside = at.x > left - 9 && at.x < right + 9 && at.y > top - 9 && at.y < bottom + 9;
    if (nearest && inside && (data.x || far(nearest) < 25)) show(nearest); else forget();
  }

  function zoom(low, high) {
    low = Math.max(left, low); high = Math.min(right, high);
    if (!data.x || high - low < (right - left) / 1e4) return;
    [from, to] = [low, high];
    const scale = (right - left) / (to - from), move = `matrix(${scale} 0 0 1 ${left - from * scale} 0)`;
    for (const part of svg.querySelectorAll("path[clip-path]")) {  // the clip would be scaled as well
      const frame = make(part.parentNode, "g", { "clip-path": part.getAttribute("clip-path") });
      part.replaceWith(frame);
      part.removeAttribute("clip-path");
      frame.append(part);
    }
    for (const part of svg.querySelectorAll("[clip-path] > path, [clip-path] > use, [clip-path] > image")) {
      const mark = part.tagName === "use" && +part.getAttribute("x");  // a marker keeps its shape
      part.setAttribute("transform", mark ? `translate(${place(mark) - mark})` : move);
    }
    const zoomed = from > left || to < right;
    svg.classList.toggle("zoomed", zoomed);
    svg.querySelector(".ticks")?.remove();
    forget();
    if (zoomed) ticks(make(svg, "g", { class: "ticks" }), value(from), value(to));
  }
  function ticks(group, low, high) {
    const size = 10 ** Math.floor(Math.log10((high - low) / 5)), steps = [1, 2, 5, 10].map((k) => k * size);
    const step = Math.max(data.x[1] < 1e4 ? 1 : 0, steps.find((step) => (high - low) / step <= 6));
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) {
      const x = left + ((at - low) / (high - low)) * (right - left);
      make(group, "path", { d: `M${x} ${bottom}v4` });
      make(group, "text", { x, y: bottom + 14 }, name(at));
    }
  }

  const position = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  let start = null;
  svg.addEventListener("pointerdown", (event) => {
    start = event.pointerType === "mouse" && data.x ? position(event).x : null;
  });
  svg.addEventListener("pointermove", (event) => {
    const at = position(event);
    if (start === null || !(event.buttons & 1)) return data.maps.length ? cell(at) : point(at);
    forget();
    const low = Math.max(left, Math.min(start, at.x)), high = Math.min(right, Math.max(start, at.x));
    make(ring, "rect", { x: low, y: top, width: Math.max(0, high - low), height: bottom - top });
  });
  svg.addEventListener("pointerup", (event) => {
    const ends = [start ?? 0, position(event).x].sort((a, b) => a - b);
    if (start !== null && ends[1] - ends[0] > 5) zoom(back(ends[0]), back(ends[1]));
    start = null;
  });
  svg.addEventListener("pointerleave", () => { start = null; forget(); });
  svg.addEventListener("dblclick", () => zoom(left, right));
  svg.addEventListener("blur", forget);
  svg.addEventListener("keydown", (event) => {
    const order = seen().sort((a, b) => a.x - b.x || a.y - b.y);
    const all = data.x ? order.filter((one, k) => !k || one.x - order[k - 1].x > 0.02) : order;
    const here = all.findIndex((one) => one === current || (current && data.x && one.x === current.x));
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], factor = { "+": 0.5, "-": 2 }[event.key];
    if (step && all.length) show(all[Math.max(0, Math.min(all.length - 1, here + step))]);
    else if (factor && data.x) {
      const middle = current?.x ?? (from + to) / 2, half = (factor * (to - from)) / 2;
      zoom(middle - half, middle + half);
    } else if (event.key === "Escape") zoom(left, right);
    else return;
    event.preventDefault();
  });
  svg.setAttribute("tabindex", 0);
  panel.parentNode.setAttribute("role", "group");
  svg.setAttribute("aria-label", "values: arrow keys" + (data.x ? "; zoom: plus, minus and Escape" : ""));
}
for (const panel of document.querySelectorAll(".panel")) enliven(panel);

// Tables: a column head sorts by its column ---------------------------------------------------------------------

const measured = (text) => parseFloat(text.split("→").pop().replaceAll(",", ""));
function sort(table, column, head) {
  const text = (row) => row.cells[column].textContent.trim();
  const rows = [...table.tBodies[0].rows], empty = (row) => ["", "-"].includes(text(row));
  const numbers = rows.every((row) => empty(row) || !isNaN(measured(text(row))));
  const before = head.getAttribute("aria-sort"), up = numbers ? before === "descending" : before !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const compare = (a, b) => numbers ? measured(text(a)) - measured(text(b)) : text(a).localeCompare(text(b));
  rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : up ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table:not(.text)")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make(head, "button", { type: "button" });
    button.append(...[...head.childNodes].filter((node) => node !== button));
    button.addEventListener("click", () => sort(table, column, head));
  });
}
})();
