"use strict";

const DROPPED = 0.15;
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

function toggle(label, pressed, onClick) {
  const button = element("button", "", label);
  button.type = "button";
  button.setAttribute("aria-pressed", pressed);
  button.addEventListener("click", onClick);
  return button;
}

function press(group, chosen) {
  for (const [index, button] of [...group.children].entries()) button.setAttribute("aria-pressed", index === chosen);
}

/** "a b, c" → whether a name holds (a and b) or c. */
function matcher(text) {
  const alternatives = text.toLowerCase().split(",").map((part) => part.trim()).filter(Boolean);
  const holds = (name, words) => words.split(/\s+/).every((word) => name.toLowerCase().includes(word));
  return (name) => !alternatives.length || alternatives.some((words) => holds(name, words));
}

function formatter({ name, kind }) {
  const values = data.rows.map((row) => row[name]).filter((value) => typeof value === "number");
  const write = (digits) => (value) =>
    value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  if (kind === "percent") return (value) => write(1)(100 * value) + "%";
  if (kind === "p") return write(3);
  const largest = Math.max(0, ...values.map(Math.abs));
  if (values.every(Number.isInteger) || largest >= 1000) return write(0);
  return write(largest >= 10 ? 1 : largest >= 1 ? 2 : 3);
}

function drawTable() {
  const formats = data.columns.map(formatter);
  const [key] = data.columns;
  const isNone = (row) => row[key.name] === "none";
  const collator = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
  let sorted = { column: null, sign: 1 };

  function cells(row) {
    const nodes = [];
    let note = row.note;
    data.columns.forEach((column, index) => {
      const value = row[column.name];
      const side = column.kind === "text" ? "text" : "";
      if (value !== null) {
        const text = typeof value === "number" && column.kind !== "text" ? formats[index](value) : String(value);
        nodes.push(element(index ? "td" : "th", side, text));
        if (!index) nodes[0].scope = "row";
      } else if (note !== null && index) {
        nodes.push(element("td", "note", note));
        note = null;
      } else if (nodes.at(-1)?.className === "note") {
        nodes.at(-1).colSpan += 1;
      } else {
        nodes.push(element("td", `${side} missing`, "–"));
      }
    });
    return nodes;
  }

  function fill() {
    const { column, sign } = sorted;
    const matches = matcher($("row-filter").value);
    const rows = data.rows.filter((row) => matches(String(row[key.name] ?? "")));
    if (column) {
      const missing = (row) => Number(row[column] === null);
      rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * compare(a[column], b[column])));
    }
    $("figures").replaceChildren(...rows.map((row) => {
      const line = element("tr", isNone(row) ? "none" : "");
      line.append(...cells(row));
      return line;
    }));
    $("row-count").textContent = `${rows.length} of ${data.rows.length} rows`;
  }

  for (const { name, label, kind } of data.columns) {
    const heading = element("th", kind === "text" ? "text" : "");
    heading.scope = "col";
    const button = element("button", "", label);
    button.type = "button";
    button.addEventListener("click", () => {
      sorted = { column: name, sign: sorted.column === name ? -sorted.sign : 1 };
      for (const other of $("headings").children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sorted.sign > 0 ? "ascending" : "descending");
      fill();
    });
    heading.append(button);
    $("headings").append(heading);
  }
  $("row-filter").addEventListener("input", fill);
  fill();
}

function decode(bits, count) {
  const bytes = atob(bits);
  return Array.from({ length: count }, (_, index) => (bytes.charCodeAt(index >> 3) >> (index & 7)) & 1);
}

/** The patches as one pixel each: opaque where kept, faint where dropped. */
function maskOf(kept, [rows, columns]) {
  const mask = element("canvas");
  [mask.width, mask.height] = [columns, rows];
  const pixels = new ImageData(columns, rows);
  kept.forEach((bit, index) => (pixels.data[4 * index + 3] = Math.round(255 * (bit ? 1 : DROPPED))));
  mask.getContext("2d").putImageData(pixels, 0, 0);
  return mask;
}

/** "himap 25%" → ["himap", "25%"]; a name without a budget → [name, undefined]. */
function splitName(name) {
  const [, method, budget] = name.match(/^(.*\S)\s+([\d.]+%?)$/) ?? [null, name];
  return [method, budget];
}

function makeCard(cell, example, picture) {
  const count = example.grid[0] * example.grid[1];
  const stages = [[-1, Array(count).fill(1)], ...cell.stages.map(([layer, bits]) => [layer, decode(bits, count)])];
  const [method, budget] = splitName(cell.name);
  const node = element("article", "card");
  const heading = element("h3");
  const canvas = element("canvas");
  const label = element("p", "kept");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  canvas.setAttribute("role", "img");
  const answer = element("p", `given ${cell.right ? "right" : "wrong"}`, cell.answer);
  heading.append(element("span"), " ", element("span", "budget", budget));
  heading.firstChild.append(...method.split(/(?<=\+)/).flatMap((part) => [part, element("wbr")]));
  node.append(heading, canvas, label, answer);
  let drawn = null;

  function show(layer) {
    const stage = stages.findLast(([before]) => before <= layer);
    if (stage === drawn) return;
    drawn = stage;
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = "copy";
    context.drawImage(picture, 0, 0);
    context.globalCompositeOperation = "destination-in";
    context.imageSmoothingEnabled = false;
    context.drawImage(maskOf(stage[1], example.grid), 0, 0, canvas.width, canvas.height);
    label.textContent = `${stage[1].reduce((sum, bit) => sum + bit)} of ${count} image tokens`;
    canvas.setAttribute("aria-label", `The picture with ${label.textContent}`);
  }
  return { node, show, name: cell.name, budget, layers: cell.stages.map(([before]) => before) };
}

function browseExamples() {
  $("examples").hidden = !data.examples.length;
  if (!data.examples.length) return;
  const names = data.examples.flatMap((example) => example.cells.map((cell) => cell.name));
  const budgets = [undefined, ...new Set(names.map((name) => splitName(name)[1]).filter(Boolean))];
  let [chosen, budget, cards] = [0, undefined, []];

  function show() {
    const matches = matcher($("card-filter").value);
    const layer = Number($("layer").value);
    $("layer-number").textContent = layer;
    for (const card of cards) {
      card.node.hidden = !matches(card.name) || (budget !== undefined && (card.budget ?? budget) !== budget);
      if (!card.node.hidden) card.show(layer);
    }
    const visible = cards.filter((card) => !card.node.hidden);
    $("no-cards").hidden = visible.length > 0;
    drawTicks(new Set(visible.flatMap((card) => card.layers)));
  }

  function drawTicks(layers) {
    $("ticks").replaceChildren(...[...layers].map((layer) => {
      const tick = element("i");
      tick.style.left = `${(100 * layer) / Math.max(1, data.lastLayer)}%`;
      return tick;
    }));
  }

  async function choose(index) {
    const example = data.examples[index];
    const thumbnail = $("thumbnails").children[index].firstChild;
    chosen = index;
    press($("thumbnails"), index);
    $("picture").src = example.picture;
    $("type").textContent = example.type;
    $("question").textContent = example.question;
    $("answer").textContent = example.answer;
    const right = example.cells.filter((cell) => cell.right).length;
    $("tally").textContent = `${right} of ${example.cells.length} answers are right`;
    await thumbnail.decode();
    if (chosen !== index) return;
    cards = example.cells.map((cell) => makeCard(cell, example, thumbnail));
    $("cards").replaceChildren(...cards.map((card) => card.node));
    show();
  }

  $("thumbnails").append(...data.examples.map((example, index) => {
    const button = toggle("", false, () => choose(index));
    const image = element("img");
    [image.src, image.alt] = [example.picture, `Example ${index + 1}: ${example.question}`];
    button.append(image);
    return button;
  }));
  $("budgets").hidden = budgets.length < 3;
  $("budgets").append(...budgets.map((value, index) => toggle(value ?? "All budgets", !index, () => {
    budget = value;
    press($("budgets"), index);
    show();
  })));
  $("layer").max = data.lastLayer;
  $("layer").addEventListener("input", show);
  $("card-filter").addEventListener("input", show);
  choose(0);
}

drawTable();
browseExamples();
