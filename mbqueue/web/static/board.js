"use strict";
// Fetches the page's changing part, updates the page, draws the figures, and sends actions.

const PERIOD = 2000; // ms between two requests of a visible page
const part = document.getElementById("part");
const pulse = document.getElementById("pulse");
const trouble = document.getElementById("trouble");
const token = document.body.dataset.token;
let csrf = "";
let tag = null;
let answeredAt = null;
let drawnFrom = null; // the address of the figures that are on the page
let timer = null;

// ---- the part ---------------------------------------------------------------------------------------------------

async function ask() {
  clearTimeout(timer);
  try {
    const answer = await fetch(document.body.dataset.part, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      const facts = await answer.json();
      tag = answer.headers.get("ETag");
      csrf = facts.csrf;
      show(facts);
    } else if (answer.status !== 304) {
      throw new Error((await answer.text()) || `the board answered ${answer.status}`);
    }
    answeredAt = Date.now();
    pulse.textContent = "live";
    pulse.className = "live";
  } catch (error) {
    tag = null; // a restarted board has a new secret for actions, so fetch everything
    pulse.className = "away";
    const since = answeredAt ? `, last answer ${ago(answeredAt / 1000)}` : "";
    pulse.textContent = `no answer from the board${since}; trying again`;
    pulse.title = String(error.message || error);
  }
  timer = setTimeout(ask, document.hidden ? 10 * PERIOD : PERIOD);
}

function show(facts) {
  trouble.hidden = !facts.trouble;
  const isKnown = facts.html || !part.hasAttribute("aria-busy");
  const below = isKnown ? " This page shows its last known state." : "";
  trouble.textContent = facts.trouble ? `The queue cannot be read.${below} ${facts.trouble}` : "";
  if (!isKnown) part.textContent = "";
  if (facts.html) {
    const fresh = document.createElement("main");
    fresh.innerHTML = facts.html;
    morphChildren(part, fresh);
    part.removeAttribute("aria-busy");
    times();
  }
  if (facts.figures && facts.figures !== drawnFrom) draw(facts.figures);
}

// Changes an element into another one, but keeps everything that is equal, so focus, open details and scrolling stay.
function morph(now, next) {
  if (now.nodeType !== next.nodeType || now.nodeName !== next.nodeName || now.id !== next.id) {
    now.replaceWith(next.cloneNode(true));
  } else if (now.nodeType !== Node.ELEMENT_NODE) {
    if (now.nodeValue !== next.nodeValue) now.nodeValue = next.nodeValue;
  } else if (!now.hasAttribute("data-keep")) {
    for (const { name } of [...now.attributes]) {
      if (!next.hasAttribute(name) && name !== "open") now.removeAttribute(name);
    }
    for (const { name, value } of next.attributes) {
      if (now.getAttribute(name) !== value) now.setAttribute(name, value);
    }
    if (now.matches("form")) return; // being filled in
    if (now.matches("input") && now !== document.activeElement) now.value = next.getAttribute("value") ?? "";
    if (now.matches("time") && now.dataset.shown === next.textContent) return;
    morphChildren(now, next);
  }
}

function morphChildren(now, next) {
  const coming = [...next.childNodes];
  const kept = new Map([...now.children].filter((child) => child.id).map((child) => [child.id, child]));
  let place = now.firstChild;
  for (const child of coming) {
    const same = child.id ? kept.get(child.id) : null;
    if (same && same !== place) now.insertBefore(same, place);
    else if (!same && place && (child.id || place.id) && child.id !== place.id) {
      now.insertBefore(child.cloneNode(true), place);
      continue;
    } else if (!place && !same) {
      now.append(child.cloneNode(true));
      continue;
    }
    const current = same ?? place;
    place = current.nextSibling;
    morph(current, child);
  }
  while (place) {
    const after = place.nextSibling;
    place.remove();
    place = after;
  }
}

// ---- time stamps, in the reader's zone --------------------------------------------------------------------------

const FULL = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const SHORT = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });

function ago(at) {
  const seconds = Math.round(Date.now() / 1000 - at);
  const size = Math.abs(seconds);
  const told =
    size < 60 ? `${size} s` : size < 3600 ? `${Math.floor(size / 60)} min` : size < 172800
      ? `${Math.floor(size / 3600)} h ${Math.floor((size % 3600) / 60)} min` : `${Math.floor(size / 86400)} days`;
  return seconds >= 0 ? `${told} ago` : `in ${told}`;
}

function times() {
  for (const element of document.querySelectorAll("time[data-at]")) {
    const at = Number(element.dataset.at);
    const told = "age" in element.dataset ? ago(at) : SHORT.format(at * 1000);
    if (element.textContent !== told) element.textContent = told;
    element.title = FULL.format(at * 1000);
  }
}

// ---- figures: the report's own, in the page's colours -----------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const colours = getComputedStyle(document.documentElement);
  const ink = colours.getPropertyValue("--ink").trim();
  const line = colours.getPropertyValue("--line").trim();
  const themed = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: ink } };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) themed[key] = { ...layout[key], gridcolor: line, linecolor: line };
    if (key === "annotations") themed[key] = layout[key].map((one) => ({ ...one, font: { ...one.font, color: ink }, bgcolor: "rgba(0,0,0,0)" }));
  }
  return themed;
}

// On a dark page, swap the report's text colour and its lightest grey.
function inked(trace) {
  if (!dark.matches) return trace;
  const text = JSON.stringify(trace).replaceAll(/"(#222222|black)"/gi, '"#d8dde3"').replaceAll('"#f4f4f4"', '"#1c2026"');
  return JSON.parse(text);
}

let loading = null;
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "plotly.js" + (token ? `?token=${encodeURIComponent(token)}` : "");
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => { loading = null; reject(new Error("plotly.js did not load")); };
    document.head.append(script);
  });
  return loading;
}

async function draw(address) {
  drawnFrom = address;
  try {
    const [Plotly, answer] = await Promise.all([plotly(), fetch(address)]);
    if (!answer.ok) throw new Error(`figures: ${answer.status}`);
    const figures = await answer.json();
    for (const [name, figure] of Object.entries(figures)) {
      const place = placeOf(name);
      if (!place) continue;
      const section = place.closest(".figure-of");
      if (section && section.nextSibling) section.parentNode.append(section); // in the report's order
      const layout = themed(figure.layout);
      if (place.clientWidth < 560) {
        layout.margin = { ...layout.margin, l: 52, r: 8 };
        layout.font = { ...layout.font, size: 11 };
      }
      const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
      await Plotly.react(place, figure.data.map(inked), layout, config);
    }
  } catch (error) {
    drawnFrom = null; // asked for again with the next answer
  }
}

function placeOf(name) {
  const there = document.getElementById(`figure-${name}`);
  if (there) return there;
  const figures = document.getElementById("figures");
  if (!figures) return null;
  const titles = JSON.parse(figures.dataset.titles);
  const section = document.createElement("section");
  section.className = `figure-of of-${name}`;
  const heading = document.createElement("h2");
  heading.textContent = titles[name] ?? name.replaceAll("-", " ").replace(/^./, (first) => first.toUpperCase());
  const place = document.createElement("div");
  place.className = "figure";
  place.id = `figure-${name}`;
  const wide = document.createElement("div");
  wide.className = "wide";
  wide.append(place);
  section.append(heading, wide);
  figures.append(section);
  return place;
}

dark.addEventListener("change", () => { drawnFrom = null; tag = null; ask(); });

// ---- actions ----------------------------------------------------------------------------------------------------

const said = document.getElementById("said");
let hiding = null;
function say(text, isError) {
  clearTimeout(hiding);
  said.textContent = text;
  said.className = isError ? "bad" : "";
  said.hidden = false;
  hiding = setTimeout(() => { said.hidden = true; }, isError ? 20000 : 6000);
}

async function act(given) {
  try {
    const address = "act" + (token ? `?token=${encodeURIComponent(token)}` : "");
    const headers = { "Content-Type": "application/json", "X-mbqueue-CSRF": csrf };
    const answer = await fetch(address, { method: "POST", headers, body: JSON.stringify(given) });
    const facts = await answer.json();
    say(facts.error ?? facts.said, !answer.ok);
    if (answer.ok) ask();
    return answer.ok;
  } catch (error) {
    say("The board did not answer, so the action may or may not have happened. Check the state before you repeat it.", true);
    return false;
  }
}

function confirmed(question, yes) {
  const dialog = document.getElementById("ask");
  document.getElementById("ask-text").textContent = question;
  dialog.querySelector("[value=yes]").textContent = yes ?? "Cancel it";
  dialog.querySelector("[value=no]").textContent = yes ? "Back" : "Keep it";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

document.getElementById("ask").addEventListener("click", (event) => {
  if (event.target.matches("button")) event.currentTarget.close(event.target.value);
});

function givenBy(element) {
  const fold = element.dataset.fold;
  const { act, experiment, session } = element.dataset;
  return { act, experiment, session, fold: fold === undefined ? null : Number(fold) };
}

part.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  event.preventDefault();
  if (button.dataset.ask && !(await confirmed(button.dataset.ask, button.dataset.yes))) return;
  button.disabled = true;
  await act(givenBy(button));
  button.disabled = false;
});

part.addEventListener("change", (event) => {
  const input = event.target.closest("input[data-act]");
  if (input) act({ ...givenBy(input), priority: input.value });
});

part.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const fields = new FormData(form);
  // form.dataset does not work here, because the form has a field named dataset.
  if (form.getAttribute("data-form") === "enqueue") {
    if (await act({ act: "enqueue", ...Object.fromEntries(fields) })) form.reset();
  } else {
    const query = new URLSearchParams(fields.getAll("name").map((name) => ["name", name]));
    if (token) query.set("token", token);
    location.search = query;
  }
});

document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
setInterval(times, 1000);
ask();
