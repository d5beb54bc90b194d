// Hands the page's data to Plotly and keeps its menus together. Nothing is computed here.
"use strict";

const template = JSON.parse(document.getElementById("template").textContent);
// Plotly's own default offers a button that uploads the picture's data.
const settings = {
  responsive: true, displaylogo: false, displayModeBar: "hover", showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"], toImageButtonOptions: { scale: 2 },
};
const storage = (() => { try { return window.sessionStorage; } catch { return null; } })();
const key = (name) => `${location.pathname} ${name}`;

// ---- pictures: those that can be seen, one after the other, so that the page answers meanwhile

let drawing = false;

async function drawVisible() {
  if (drawing) return;
  drawing = true;
  document.documentElement.dataset.drawn = "no";
  for (let place; (place = [...document.querySelectorAll(".plot:not([data-drawn])")].find((one) => one.offsetParent !== null)); ) {
    place.dataset.drawn = "yes";
    const figure = JSON.parse(place.firstElementChild.textContent);
    const inner = place.appendChild(document.createElement("div"));
    inner.style.height = "100%";
    await Plotly.newPlot(inner, figure.data, { ...figure.layout, template, autosize: true }, settings).catch((error) => {
      inner.textContent = `This picture cannot be drawn: ${error.message}`;
      console.error(error);
    });
    await new Promise((next) => setTimeout(next));
  }
  drawing = false;
  document.documentElement.dataset.drawn = "yes";
}

// ---- menus: those of one group change together, and a reload keeps what was chosen

function connect(select, name, change) {
  select.addEventListener("change", () => {
    storage?.setItem(key(name), select.value);
    change();
  });
  const kept = storage?.getItem(key(name));
  if (kept && [...select.options].some((one) => one.value === kept)) {
    select.value = kept;
    change();
  }
}

function others(holder, selector) {
  return holder.dataset.group ? [...document.querySelectorAll(selector)].filter((one) => one.dataset.group === holder.dataset.group) : [holder];
}

document.querySelectorAll(".choice").forEach((choice, number) => {
  const select = choice.querySelector("select");
  const show = () => {
    for (const other of others(choice, ".choice")) {
      const menu = other.querySelector("select");
      if (![...menu.options].some((one) => one.value === select.value)) continue;
      menu.value = select.value;
      [...other.children].filter((one) => one.classList.contains("option")).forEach((one, place) => { one.hidden = place !== menu.selectedIndex; });
    }
    drawVisible();
  };
  connect(select, `choice ${choice.dataset.group || number}`, show);
});

// ---- texts in the colours of experts

const hue = (expert) => Math.round((expert * 137.508 + 205) % 360); // the golden angle: neighbouring numbers get hues far apart
const option = (text, value) => new Option(text, String(value));

function fillTokens(holder, number) {
  const data = JSON.parse(holder.querySelector("script").textContent);
  const [layerMenu, expertMenu] = holder.querySelectorAll("select");
  const [text, detail, legend] = [".text", ".detail", ".legend"].map((one) => holder.querySelector(one));
  layerMenu.replaceChildren(...data.layers.map((layer, place) => option(layer, place)));
  const spans = data.tokens.map((token, position) => {
    const span = document.createElement("span");
    span.className = "token";
    span.dataset.position = position;
    span.textContent = token;
    return span;
  });
  text.replaceChildren(...spans);

  const colour = () => {
    const layer = layerMenu.selectedIndex;
    const wanted = expertMenu.value === "" ? null : Number(expertMenu.value);
    spans.forEach((span, position) => {
      const experts = data.experts[layer][position];
      span.style.setProperty("--hue", hue(wanted ?? experts[0]));
      span.classList.toggle("other", experts.length === 0 || (wanted !== null && !experts.includes(wanted)));
      span.dataset.expert = experts[0] ?? "";
    });
  };
  const relist = () => {
    const layer = layerMenu.selectedIndex;
    const counts = new Array(data.experts_of_layer[layer]).fill(0);
    for (const experts of data.experts[layer]) if (experts.length) counts[experts[0]] += 1;
    const order = counts.map((_, expert) => expert).sort((a, b) => counts[b] - counts[a] || a - b);
    const kept = expertMenu.value;
    expertMenu.replaceChildren(option("all, first choice", ""), ...counts.map((_, expert) => option(`${expert}, any choice`, expert)));
    expertMenu.value = counts.length > Number(kept) ? kept : "";
    const shown = order.filter((expert) => counts[expert] > 0).slice(0, 16);
    legend.replaceChildren(...shown.map((expert) => {
      const item = document.createElement("li");
      item.style.setProperty("--hue", hue(expert));
      item.textContent = `Expert ${expert}: ${((100 * counts[expert]) / Math.max(1, spans.length)).toFixed(0)} %`;
      return item;
    }), ...(order.filter((expert) => counts[expert] > 0).length > 16 ? [Object.assign(document.createElement("li"), { className: "more", textContent: "the 16 most frequent" })] : []));
    colour();
  };
  const show = () => {
    for (const other of others(holder, ".tokens")) {
      const menu = other.querySelector("select");
      if (layerMenu.selectedIndex < menu.options.length) menu.selectedIndex = layerMenu.selectedIndex;
      other.relist?.();
    }
  };
  const point = (position) => {
    if (!(position >= 0 && position < spans.length)) return;
    holder.querySelector(".chosen")?.classList.remove("chosen");
    spans[position].classList.add("chosen");
    detail.replaceChildren(...tokenDetail(data, position, layerMenu.selectedIndex));
  };
  holder.relist = relist;
  expertMenu.addEventListener("change", colour);
  text.addEventListener("mouseover", (event) => point(Number(event.target.dataset.position)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    point(Number(holder.querySelector(".chosen")?.dataset.position ?? -1) + step);
  });
  relist();
  connect(layerMenu, `tokens ${holder.dataset.group || number}`, show);
}

function tokenDetail(data, position, here) {
  const head = document.createElement("p");
  const code = document.createElement("code");
  code.textContent = data.tokens[position].replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(a part of a character)";
  head.append(`Token ${position}: `, code);
  const table = document.createElement("table");
  const row = (cells, tag, chosen) => {
    const line = table.insertRow();
    line.classList.toggle("here", chosen);
    for (const text of cells) line.append(Object.assign(document.createElement(tag), { textContent: text }));
  };
  row(["Layer", "Expert", ...(data.weights ? ["Weight"] : []), ...(data.lores ? ["LoRE"] : [])], "th", false);
  data.experts.forEach((layer, place) => layer[position].forEach((expert, choice) => row([
    data.layers[place], expert,
    ...(data.weights ? [data.weights[place][position][choice].toFixed(2)] : []),
    ...(data.lores ? [data.lores[place][position][choice].join(", ")] : []),
  ], "td", place === here)));
  return [head, table];
}

document.querySelectorAll(".tokens").forEach(fillTokens);

// ---- light and dark; refreshing

const root = document.documentElement;
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const themeButton = document.getElementById("theme");
const showTheme = () => { themeButton.textContent = dark() ? "Light" : "Dark"; };
const keptTheme = storage?.getItem(key("theme"));
if (keptTheme) root.dataset.theme = keptTheme;
themeButton.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  storage?.setItem(key("theme"), root.dataset.theme);
  showTheme();
});
showTheme();

// From a server: new numbers take the place of the old ones. Pictures and menus that are still there stay, with their zoom and choice.
let renewing = false;

async function renew() {
  if (renewing) return;
  renewing = true;
  try {
    const answer = await fetch(`?parts&have=${document.body.dataset.version ?? ""}`);
    if (answer.status === 200) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const same = shape(fresh) === shape(document);
      if (same) replaceParts(fresh);
      else location.reload();
      document.body.dataset.version = answer.headers.get("etag") ?? "";
    }
    document.getElementById("lost")?.remove();
  } catch (error) {
    if (!document.getElementById("lost")) {
      const lost = Object.assign(document.createElement("p"), { id: "lost", className: "notice warning", textContent: "The server does not answer. The numbers are old." });
      document.querySelector("main").prepend(lost);
    }
  }
  renewing = false;
}

const shape = (page) => [...page.querySelectorAll("main section > h2, main .plot, main .choice option")].map((one) => one.ariaLabel ?? one.textContent).join("\n");

function replaceParts(fresh) {
  const old = document.querySelectorAll("main .plot");
  fresh.querySelectorAll("main .plot").forEach((plot, place) => {
    const data = plot.firstElementChild.textContent;
    old[place].firstElementChild.textContent = data;
    const inner = old[place].children[1];
    if (!inner) return;
    const figure = JSON.parse(data);
    Plotly.react(inner, figure.data, { ...figure.layout, template, autosize: true }, settings);
  });
  const kept = (page) => [...page.querySelectorAll("main section > *, main .option > *, .facts, footer")].filter((one) => !one.querySelector(".plot") && !one.matches(".plot, .choice, h2"));
  const [before, after] = [kept(document), kept(fresh)];
  if (before.length === after.length) before.forEach((one, place) => { if (one.outerHTML !== after[place].outerHTML) one.replaceWith(after[place]); });
  else location.reload();
}

const refresh = document.getElementById("refresh");
if (refresh) {
  refresh.checked = storage?.getItem(key("refresh")) !== "no";
  refresh.addEventListener("change", () => storage?.setItem(key("refresh"), refresh.checked ? "yes" : "no"));
  setInterval(() => { if (refresh.checked && !document.hidden) ("live" in document.body.dataset ? renew() : location.reload()); }, 1000 * Number(document.body.dataset.refresh));
}

drawVisible();
addEventListener("beforeprint", drawVisible);
