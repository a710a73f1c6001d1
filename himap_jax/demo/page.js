// The page: controls become the flags of himap_jax.run, which the server reads; its answer is shown beside the other.
"use strict";

const find = (id) => document.getElementById(id);
const SIDES = ["plain", "pruned"];
const CONTROLS = ["none", "random", "uniform"];
let about, picture = null, example = null, shown = null;

function make(tag, values = {}, ...children) {
  const node = Object.assign(document.createElement(tag), values);
  node.append(...children);
  return node;
}

function choose(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
}

// What was chosen

function methodName() {
  const second = find("then").hidden ? "" : find("second").value;
  return find("method").value + (second && `+${second}`);
}

const percent = () => about.num_image_tokens === null;
const keepLabel = (value) => percent() ? `${value}%` : `${value} of ${about.num_image_tokens}`;
const values = (selector) => [...document.querySelectorAll(selector)].map((input) => input.value);

function settings() {
  const layers = values(".layer"), keep = values(".keep").map((value) => percent() ? `${value}%` : value);
  const parameters = [...document.querySelectorAll("#parameters input")].map((input) => `${input.name}:${input.value}`);
  const lists = [["prune_layers", layers], ["keep", keep], ["method_parameters", parameters]];
  return [`--method=${methodName()}`, ...lists.filter(([, list]) => list.length).map(([name, list]) => `--${name}=${list}`)]
    .join(" ");
}

function changed() {
  find("settings").value = settings();
  find("name").textContent = methodName();
  if (shown) {
    find("results").classList.add("stale");
    find("status").textContent = "The answers are to what was asked before; ask again.";
  }
}

function slider(kind, text, values, show) {
  const output = make("output", { value: show(values.value) });
  const input = make("input", { type: "range", className: kind, ...values });
  input.addEventListener("input", () => { output.value = show(input.value); changed(); });
  return make("label", { className: "slider" }, `${text} `, output, input);
}

function showStages(layers, keep) {
  const method = about.methods[methodName()], single = method.acts === "before";
  find("stages").replaceChildren(...layers.map((layer, index) => {
    const isBefore = layer === 0 && (single || methodName().includes("+") && index === 0);
    const range = isBefore ? { min: 0, max: 0, disabled: true } : { min: method.acts === "inside" ? 1 : 0, max: about.num_layers - 1 };
    const most = percent() ? 100 : about.num_image_tokens;
    return make("div", { className: "stage" },
      slider("layer", "before layer", { ...range, value: layer }, (value) => value),
      slider("keep", "keep", { min: percent() ? 0.5 : 1, max: most, step: percent() ? 0.5 : 1, value: keep[index] }, keepLabel));
  }));
  document.querySelectorAll(".stage").forEach((stage, index) => {
    for (const input of stage.querySelectorAll("input")) input.id = `${input.className}-${index}`;
  });
  find("change").hidden = !method.repeats || !layers.length;
  changed();
}

function showMethod(given = {}) {
  const method = about.methods[methodName()];
  const frozen = method.frozen.length ? ` Image tokens are not updated in layers ${method.frozen.join(", ")}.` : "";
  find("source").textContent = `${method.source}.${frozen}`;
  const parameters = { ...method.parameters, ...given.parameters };
  find("parameters").replaceChildren(...Object.entries(parameters).map(([name, value]) => {
    const input = make("input", { type: "number", step: "any", name, value });
    input.addEventListener("input", changed);
    return make("label", {}, name.replaceAll("_", " "), input);
  }));
  showStages(given.layers ?? method.layers, given.keep ?? method.keep);
}

function showSeconds() {
  const first = find("method").value;
  const seconds = Object.keys(about.methods).filter((name) => name.startsWith(`${first}+`)).map((name) => name.split("+")[1]);
  find("then").hidden = !seconds.length;
  find("second").replaceChildren(make("option", { value: "", textContent: "nothing" }),
    ...seconds.map((name) => make("option", { value: name, textContent: name })));
}

// Flags of a text, as far as the page has controls for them; the server judges the rest.
function useSettings(text) {
  const flags = Object.fromEntries([...text.matchAll(/--(\w+)=(\S+)/g)].map((match) => [match[1], match[2]]));
  const name = flags.method in about.methods ? flags.method : Object.keys(about.methods).find((own) => !CONTROLS.includes(own));
  const [first, second = ""] = name.split("+"), list = (flag) => flags[flag]?.split(",");
  find("method").value = first;
  showSeconds();
  find("second").value = second;
  const count = (value) => value.endsWith("%") === percent() ? parseFloat(value)
    : percent() ? null : Math.max(1, Math.round(parseFloat(value) / 100 * about.num_image_tokens));
  const given = { layers: list("prune_layers")?.map(Number), keep: list("keep")?.map(count) };
  given.parameters = Object.fromEntries((list("method_parameters") ?? []).map((pair) => pair.split(":")));
  const fits = flags.method === name && (given.keep ?? given.layers)?.length === (given.layers ?? about.methods[name].layers).length;
  showMethod(fits && !given.keep?.includes(null) ? given : { parameters: given.parameters });
}

// The picture

function usePicture(file, chosen = null) {
  fail(file.size > about.most_bytes
    ? `the picture has ${file.size.toLocaleString("en")} bytes; at most ${about.most_bytes.toLocaleString("en")} are taken` : "");
  if (file.size > about.most_bytes) return;
  picture = file;
  URL.revokeObjectURL(find("preview").src);
  find("preview").src = URL.createObjectURL(file);
  find("preview").hidden = false;
  find("hint").hidden = true;
  choose(find("examples").children, chosen);
  if (!chosen) example = null;
  const questions = example?.questions ?? [];
  find("question").value = questions[0] ?? find("question").value;
  find("suggestions").replaceChildren(...questions.map((text) => {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => { find("question").value = text; changed(); });
    return button;
  }));
  changed();
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Answers

function fail(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = parts.pop();
    yield* parts.map((part) => JSON.parse(part));
    if (done) return;
  }
}

async function ask() {
  fail("");
  find("ask").disabled = true;
  const started = performance.now(), question = find("question").value, flags = settings(), given = picture;
  let doing = "sending", isStale = false;
  const clock = setInterval(() => {
    find("status").textContent = `${doing} … ${((performance.now() - started) / 1000).toFixed(0)} s`;
  }, 250);
  try {
    const body = JSON.stringify({
      picture: given ? await base64(given) : "", question, settings: flags,
    });
    const response = await fetch("answer", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (!response.ok) throw new Error(`the server refused the request: ${response.status} ${response.statusText}`);
    let ended = false;
    for await (const event of lines(response)) {
      if (event.waiting) doing = `waiting for ${event.waiting} before you`;
      if (event.waiting === 0) doing = "answering; new settings are compiled first";
      if (event.compiled) doing = `compiled in ${event.compiled.toFixed(1)} s; timing a second run`;
      if (event.text !== undefined) showText(event.side, event.text);
      if (event.error) fail(event.error);
      if (event.result) {
        show(event.result);
        isStale = question !== find("question").value || flags !== settings() || given !== picture;
      }
      ended = Boolean(event.error || event.result);
    }
    if (!ended) throw new Error("the server has gone; is its command still running?");
  } catch (error) {
    fail(error.message);
  }
  clearInterval(clock);
  find("status").textContent = "";
  if (isStale) changed();
  find("ask").disabled = false;
}

function showText(side, text) {
  const node = document.querySelector(`#${side} .answer`);
  node.textContent = text;
  node.className = text.length > 60 ? "answer long" : "answer";
}

const milliseconds = (seconds) => `${(1000 * seconds).toLocaleString("en", { maximumSignificantDigits: 3 })} ms`;
const billions = (flops) => `${(flops / 1e9).toLocaleString("en", { maximumSignificantDigits: 3 })} G`;
const perToken = (side) => side.decode_seconds / Math.max(side.num_new_tokens - 1, 1);
const MEASURES = [
  ["prefill", (side) => side.prefill_seconds, milliseconds, "time to the first token"],
  ["decode, a token", perToken, milliseconds, "time of each further token"],
  ["FLOPs, prefill", (side) => side.prefill_flops, billions, "multiplications up to the first token, vision tower included"],
  ["FLOPs, image tokens", (side) => side.image_flops, billions, "multiplications of decoder layers on image tokens (HiMAP, Eq. 10)"],
  ["KV cache", (side) => side.cache_bytes, (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} MB`, "keys and values of the prompt"],
  ["image tokens left", (side) => side.image_tokens.at(-1), (count) => count.toLocaleString("en"), "that the last layer sees"],
];

function showSide(side, result) {
  const own = result[side], article = find(side);
  showText(side, own.text || "(no text)");
  article.querySelector("tbody").replaceChildren(...MEASURES.map(([name, of, write, title]) => {
    const most = Math.max(...SIDES.map((other) => of(result[other]))) || 1, bar = make("div");
    bar.style.width = `${100 * of(own) / most}%`;
    const share = side === "pruned" && of(result.plain) ? `${Math.round(100 * of(own) / of(result.plain))}%` : "";
    return make("tr", { title }, make("th", { textContent: name, scope: "row" }), make("td", { className: "bar" }, bar),
      make("td", { textContent: write(of(own)) }), make("td", { className: "share", textContent: share }));
  }));
  const tokens = `${own.num_new_tokens} token${own.num_new_tokens === 1 ? "" : "s"}`;
  article.querySelector(".note").textContent = own.compile_seconds
    ? `${tokens}; compiled first in ${own.compile_seconds.toFixed(1)} s, timed in a second run` : `${tokens}; compiled before`;
}

function spanName({ first, last }) {
  if (first === last) return "before the decoder";
  return last - first === 1 ? `layer ${first}` : `layers ${first}–${last - 1}`;
}

function spanAt(layer) {
  return shown.spans.findIndex((span) => span.first <= layer && layer < span.last);
}

function showLayer(index) {
  const span = shown.spans[index], all = shown.spans[0].num_image_tokens;
  shown.views.forEach((view, number) => { find("views").children[number].lastChild.src = view.tints[index]; });
  find("now").textContent = `${spanName(span)}: ${span.num_image_tokens} of ${all} image tokens`;
  choose(find("strip").children, find("strip").children[index]);
}

function viewNode(view, overlay) {
  return make("div", { className: "view" }, make("img", { src: view.picture, alt: "the picture as the model sees it" }),
    make("img", { src: overlay, alt: "" }));
}

function show(result) {
  shown = result;
  find("results").classList.remove("stale");
  for (const side of SIDES) showSide(side, result);
  const isSame = result.plain.text === result.pruned.text;
  find("verdict").textContent = isSame ? "same answer" : "another answer";
  find("verdict").className = isSame ? "" : "other";
  find("verdict").hidden = false;
  find("seen").hidden = !result.views.length;
  find("no-grid").hidden = Boolean(result.views.length);
  find("views").replaceChildren(...result.views.map((view) => viewNode(view, view.tints[0])));
  const { spans } = result;
  find("legend").replaceChildren(...result.colours.map((colour, stage) => {
    const isLast = stage === spans.length - 1, dot = make("i");
    const count = spans[stage].num_image_tokens - (isLast ? 0 : spans[stage + 1].num_image_tokens);
    dot.style.background = colour;
    return make("li", {}, dot, isLast ? `kept to the end: ${count}` : `dropped before ${spans[stage].last ? `layer ${spans[stage].last}` : "the decoder"}: ${count}`);
  }));
  find("strip").replaceChildren(...spans.map((span, index) => {
    const views = result.views.slice(0, 1).map((view) => viewNode(view, view.veils[index]));
    const button = make("button", { type: "button" }, ...views, make("b", { textContent: spanName(span) }),
      `${span.num_image_tokens} tokens`);
    button.addEventListener("click", () => {
      find("layer").value = find("layer-number").value = span.first;
      showLayer(index);
    });
    return button;
  }));
  find("layer").max = about.num_layers - 1;
  find("layer").value = find("layer-number").value = 0;
  showLayer(spanAt(0));
}

// The start

async function start() {
  for (const side of SIDES) find(side).append(find("side").content.cloneNode(true));
  about = await (await fetch("about")).json();
  find("model").textContent = `Model: ${about.checkpoint}. Nothing that you show or ask is stored.`;
  if (about.num_image_tokens !== null) find("tokens").textContent = about.num_image_tokens;
  find("layers").textContent = `${about.num_layers} layers`;
  const places = { inside: "inside the decoder", before: "before the decoder", anywhere: "controls" };
  const single = Object.entries(about.methods).filter(([name]) => !name.includes("+"));
  const place = ([name, { acts }]) => CONTROLS.includes(name) ? "anywhere" : acts === "before" ? "before" : "inside";
  for (const [own, label] of Object.entries(places)) {
    const names = single.filter((entry) => place(entry) === own).map(([name]) => name);
    find("method").append(make("optgroup", { label }, ...names.map((name) => make("option", { value: name, textContent: name }))));
  }
  find("examples").replaceChildren(...about.examples.map((own) => {
    const button = make("button", { type: "button" }, make("img", { src: own.path, alt: own.questions[0] ?? "example" }));
    button.addEventListener("click", async () => {
      example = own;
      const file = await (await fetch(own.path)).blob();
      if (example === own) usePicture(file, button);
    });
    return button;
  }));
  find("method").addEventListener("change", () => { showSeconds(); showMethod(); });
  find("second").addEventListener("change", () => showMethod());
  find("settings").addEventListener("change", () => useSettings(find("settings").value));
  find("more").addEventListener("click", () => addStage(1));
  find("fewer").addEventListener("click", () => addStage(-1));
  find("copy").addEventListener("click", copy);
  find("file").addEventListener("change", () => { if (find("file").files[0]) usePicture(find("file").files[0]); });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    find("drop").addEventListener(kind, (event) => {
      event.preventDefault();
      find("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) usePicture(event.dataTransfer.files[0]);
    });
  }
  find("layer").addEventListener("input", () => {
    find("layer-number").value = find("layer").value;
    showLayer(spanAt(Number(find("layer").value)));
  });
  find("question").addEventListener("input", changed);
  find("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  useSettings(about.settings);
  find("examples").firstChild?.click();
}

function addStage(step) {
  const layers = values(".layer").map(Number), keep = values(".keep").map(Number);
  const first = about.methods[methodName()].layers.length;
  if (step < 0 && layers.length > first) showStages(layers.slice(0, -1), keep.slice(0, -1));
  if (step > 0 && layers.at(-1) < about.num_layers - 1) {
    const half = percent() ? keep.at(-1) / 2 : Math.round(keep.at(-1) / 2);
    showStages([...layers, Math.min(layers.at(-1) + 6, about.num_layers - 1)], [...keep, Math.max(half, percent() ? 0.5 : 1)]);
  }
}

async function copy() {
  find("settings").select();
  if (navigator.clipboard) await navigator.clipboard.writeText(find("settings").value);
  else document.execCommand("copy");
  find("copy").textContent = "Copied";
  setTimeout(() => { find("copy").textContent = "Copy"; }, 1500);
}

start().catch((error) => fail(error.message));
