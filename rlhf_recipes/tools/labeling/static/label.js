// Keys, sorting, time and messages of the labelling page. Without this file the page still works, by mouse and tab.
"use strict";

const find = (selector) => document.querySelector(selector);
const findAll = (selector) => [...document.querySelectorAll(selector)];

function say(text) {
  const status = find("#status");
  status.textContent = "";
  requestAnimationFrame(() => { status.textContent = text; }); // a change, even to the same words, is read out
}

// ---- How long an item was seen: the time in another tab does not count

let seen = 0;
let since = performance.now();

function pauseClock() {
  if (since !== null) seen += performance.now() - since;
  since = null;
}

function setClock(milliseconds) {
  seen = milliseconds;
  since = document.hidden ? null : performance.now();
}

document.addEventListener("visibilitychange", () => document.hidden ? pauseClock() : setClock(seen));

document.addEventListener("formdata", (event) => {
  if (event.target.id !== "judge") return;
  const now = since === null ? 0 : performance.now() - since;
  event.formData.set("milliseconds", String(Math.round(seen + now)));
});

// ---- A new item on the page

function startItem() {
  setClock(0);
  for (const part of findAll(".move, .handle")) part.hidden = false;
  const box = find("#use-keys");
  if (box) box.checked = localStorage.getItem("keys") !== "off";
}

document.addEventListener("htmx:after:swap", (event) => {
  if (event.detail.ctx.target?.id !== "main") return;
  find("#alert").textContent = "";
  startItem();
  if (find("#said")) say(`${find("#said").textContent} ${find("#heading").textContent}`);
  find("#heading, input[autofocus]")?.focus({ preventScroll: true });
});

const warn = (text) => { find("#alert").textContent = text; };
document.addEventListener("htmx:response:error", (event) => warn(event.detail.ctx.text));
document.addEventListener("htmx:error", () => warn("Not saved: the server does not answer. Start it, and try again."));

// What is on the page is given back. A page that is loaded again has a new showing, which this does not name.
window.addEventListener("pagehide", () => {
  const showing = find("#judge")?.dataset.showing;
  if (showing) navigator.sendBeacon("/leave", new URLSearchParams({ showing }));
});
window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

// ---- Keys: what has `data-key` is pressed by it

const isTyping = (element) =>
  element.isContentEditable || element.matches("textarea, select, input:not([type=radio], [type=checkbox])");

document.addEventListener("change", (event) => {
  if (event.target.id === "use-keys") localStorage.setItem("keys", event.target.checked ? "on" : "off");
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.repeat) return;
  if (isTyping(event.target)) {
    if (event.key === "Escape") find("#heading").focus();
    return;
  }
  // Enter in a form presses its first button: on a strength it would say that the first answer is better.
  if (event.key === "Enter" && event.target.matches("[type=radio]")) return event.preventDefault();
  if (!find("#use-keys")?.checked) return;
  if (event.key === "Enter" && event.target.matches("a, button, summary, input")) return; // its own
  if (find(".ranking") && /^[1-9]$/.test(event.key)) return giveRank(Number(event.key));
  const pressed = find(`[data-key="${CSS.escape(event.key)}"]:enabled`);
  if (!pressed) return;
  event.preventDefault();
  if (pressed.matches("textarea")) pressed.focus();
  else pressed.click();
});

// ---- Rankings

const cards = () => findAll(".ranking .answer");
const rankOf = (card) => card.querySelector("[name=rank]");
const nameOf = (card) => card.querySelector("h2").textContent;

function giveRank(rank) {
  if (rank > cards().length) return;
  const marked = document.activeElement.closest(".ranking .answer");
  const card = marked ?? cards().find((one) => !rankOf(one).value);
  if (!card) return say("All answers have a rank. Enter saves them.");
  rankOf(card).value = rank;
  const next = cards().find((one) => !rankOf(one).value);
  if (marked) (next ?? card).querySelector("section").focus();
  say(`${nameOf(card)}: ${rank}.${next ? "" : " All have a rank. Enter saves them."}`);
}

function rankByPlace(card) {
  cards().forEach((one, place) => { rankOf(one).value = place + 1; });
  say(`${nameOf(card)} is in place ${cards().indexOf(card) + 1} of ${cards().length}.`);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-move]");
  if (!button) return;
  const card = button.closest(".answer");
  if (button.dataset.move === "-1") card.previousElementSibling?.before(card);
  else card.nextElementSibling?.after(card);
  button.focus();
  rankByPlace(card);
});

document.addEventListener("pointerdown", (event) => {
  const handle = event.target.closest?.(".handle");
  if (!handle) return;
  const card = handle.closest(".answer");
  const controller = new AbortController();
  const { signal } = controller;
  event.preventDefault();
  card.classList.add("dragged");
  document.addEventListener("pointermove", ({ clientY }) => {
    const middle = (one) => { const box = one.getBoundingClientRect(); return box.top + box.height / 2; };
    let beside; // a quick hand passes several cards at once
    while ((beside = card.previousElementSibling) && clientY < middle(beside)) beside.before(card);
    while ((beside = card.nextElementSibling) && clientY > middle(beside)) beside.after(card);
  }, { signal });
  for (const end of ["pointerup", "pointercancel"]) {
    document.addEventListener(end, () => {
      controller.abort();
      card.classList.remove("dragged");
      card.querySelector("section").focus({ preventScroll: true }); // not a button, which Enter would press
      rankByPlace(card);
    }, { signal });
  }
});

startItem();
