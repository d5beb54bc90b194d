// Asks the server for a text with the experts of its tokens, and shows each token in the colour of its expert.
"use strict";

const element = (id) => document.getElementById(id);
const state = { model: null, records: [], answer: "", promptTokens: 0, chosen: -1, abort: null };

// Neighbouring numbers get hues far apart: the golden angle.
const hue = (expert) => Math.round((expert * 137.508 + 205) % 360);

function say(text, wrong = false) {
  element("status").textContent = text;
  element("status").classList.toggle("wrong", wrong);
}

function headers() {
  const key = element("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  element("key-label").hidden = response.status !== 401 && element("key-label").hidden;
  return new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  state.model = (await response.json()).data[0];
  const layers = state.model.moe_layers;
  const lores = layers.some((layer) => layer.lores) ? `, ${layers[0].lores} LoREs in each` : "";
  const experts = layers.length ? `${layers.length} layers with experts, ${layers[0].experts} experts${lores}` : "no experts: all tokens stay without colour";
  element("model").textContent = `${state.model.id}: ${experts}. Context: ${state.model.context_length.toLocaleString("en")} tokens.`;
  element("tokens").max = state.model.context_length;
  element("layer").replaceChildren(...layers.map((layer, index) => new Option(String(layer.layer), String(index))));
}

// ---- generating

async function* parts(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      yield part;
    }
  }
}

async function generate() {
  Object.assign(state, { records: [], answer: "", promptTokens: 0, chosen: -1, abort: new AbortController() });
  element("text").replaceChildren();
  element("result").hidden = false;
  say("Generating…");
  if (state.model === null) await loadModel();
  const seed = element("seed").value;
  const body = {
    model: state.model.id, prompt: element("prompt").value, max_tokens: Number(element("tokens").value),
    temperature: Number(element("temperature").value), seed: seed === "" ? null : Number(seed),
    stream: true, stream_options: { include_usage: true }, return_routing: true,
  };
  const started = performance.now();
  const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.abort.signal });
  if (!response.ok) throw await failure(response);
  let usage = null;
  for await (const part of parts(response)) {
    usage = part.usage ?? usage;
    for (const choice of part.choices) take(choice);
  }
  const seconds = (performance.now() - started) / 1000;
  say(usage === null ? "Done." : `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s.`);
}

function take(choice) {
  const records = choice.routing ?? [];
  if (state.records.length === 0) state.promptTokens = records.length;
  state.answer += choice.text;
  element("text").querySelector(".unread")?.remove();
  for (const record of records) {
    state.records.push(record);
    element("text").append(tokenElement(record));
  }
  appendUnread();
  showLegend();
}

// What the model has written and not read yet has no experts.
function appendUnread() {
  const read = state.records.slice(state.promptTokens).map((record) => record.text).join("");
  const rest = state.answer.slice(read.length);
  if (!rest) return;
  const span = document.createElement("span");
  span.className = "token unread";
  span.textContent = rest;
  element("text").append(span);
}

// ---- showing

function tokenElement(record) {
  const span = document.createElement("span");
  span.className = "token";
  span.dataset.position = record.position;
  span.classList.toggle("prompt", record.position < state.promptTokens || state.records.length <= state.promptTokens);
  span.append(record.text, document.createElement("sub"));
  colour(span, record);
  return span;
}

function ordered(record) {
  const layer = element("layer").selectedIndex;
  const weights = record.weights[layer] ?? [];
  return (record.experts[layer] ?? []).map((expert, place) => ({ expert, weight: weights[place], lores: record.lores?.[layer]?.[place] ?? [] }))
    .sort((a, b) => b.weight - a.weight);
}

function colour(span, record) {
  const experts = ordered(record);
  span.classList.toggle("read", experts.length > 0);
  span.classList.toggle("two", experts.length > 1);
  if (experts.length > 0) span.style.setProperty("--hue", hue(experts[0].expert));
  if (experts.length > 1) span.style.setProperty("--second", hue(experts[1].expert));
  span.dataset.expert = experts.length > 0 ? experts[0].expert : "";
  span.title = experts.map((one) => `expert ${one.expert} (${one.weight.toFixed(2)})${one.lores.length ? `, LoRE ${one.lores.join(", ")}` : ""}`).join("\n");
  span.querySelector("sub").textContent = experts.map((one) => one.expert).join(",");
}

function showLegend() {
  const layer = state.model?.moe_layers[element("layer").selectedIndex];
  if (!layer) return;
  const count = new Array(layer.experts).fill(0);
  for (const record of state.records) for (const one of ordered(record)) count[one.expert] += 1;
  const total = Math.max(1, state.records.length);
  element("legend").replaceChildren(...count.map((number, expert) => {
    const item = document.createElement("li");
    item.style.setProperty("--hue", hue(expert));
    item.textContent = `Expert ${expert}: ${Math.round((100 * number) / total)} %`;
    return item;
  }));
}

function choose(position) {
  const tokens = element("text").querySelectorAll("[data-position]");
  if (position < 0 || position >= tokens.length) return;
  tokens[state.chosen]?.classList.remove("chosen");
  state.chosen = position;
  tokens[position].classList.add("chosen");
  showDetail(state.records[position]);
}

function showDetail(record) {
  const head = document.createElement("p");
  const code = document.createElement("code");
  code.textContent = record.text.replaceAll("\n", "⏎") || "(a part of a character)";
  head.append(`Token ${record.position}: `, code);
  const table = document.createElement("table");
  const row = (cells, tag, here) => {
    const line = table.insertRow();
    line.classList.toggle("here", here);
    for (const text of cells) {
      const cell = document.createElement(tag);
      cell.textContent = text;
      line.append(cell);
    }
  };
  const hasLores = record.lores !== null;
  row(["Layer", "Expert", "Weight", ...(hasLores ? ["LoRE"] : [])], "th", false);
  record.experts.forEach((experts, index) => experts.forEach((expert, place) => {
    const lores = hasLores ? [record.lores[index][place]?.join(", ") ?? ""] : [];
    row([state.model.moe_layers[index].layer, expert, record.weights[index][place].toFixed(3), ...lores], "td", index === element("layer").selectedIndex);
  }));
  element("detail").replaceChildren(head, table);
}

function recolour() {
  for (const span of element("text").querySelectorAll("[data-position]")) colour(span, state.records[Number(span.dataset.position)]);
  showLegend();
  if (state.chosen >= 0) showDetail(state.records[state.chosen]);
}

// ---- what a person does

function setBusy(busy) {
  element("run").disabled = busy;
  element("stop").disabled = !busy;
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setBusy(true);
  try {
    await generate();
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    setBusy(false);
  }
});
element("stop").addEventListener("click", () => state.abort?.abort());
element("layer").addEventListener("change", recolour);
element("numbers").addEventListener("change", () => element("text").classList.toggle("with-numbers", element("numbers").checked));
element("text").addEventListener("mouseover", (event) => {
  const token = event.target.closest("[data-position]");
  if (token) choose(Number(token.dataset.position));
});
element("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  choose(Math.max(0, state.chosen + step));
});
element("key").addEventListener("change", () => loadModel().then(() => say(""), (error) => say(error.message, true)));
loadModel().catch((error) => say(error.message, true));
