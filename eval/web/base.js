"use strict";
// Shared by all pages: reading the data, making elements, theme, explanations, tooltip.

const pageData = JSON.parse(document.getElementById("data").textContent);

/** The element with an id. */
const byId = (id) => document.getElementById(id);

/** An HTML element: make("p", {class: "note"}, "text", child, …). Functions become listeners. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, like make. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

/** Bytes of a base64 string. */
function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Radio buttons that read as one control; `onChange` gets the chosen index. */
function makeChoices(fieldset, name, labels, chosen, onChange) {
  const legend = fieldset.querySelector("legend");
  const inputs = labels.map((label, i) =>
    make("label", {},
      make("input", { type: "radio", name, value: i, checked: i === chosen, change: () => onChange(i) }),
      make("span", {}, label)));
  fieldset.replaceChildren(legend, ...inputs);
}

/** Calls `render` now and whenever the element's width changes. */
function onResize(element, render) {
  let width = -1;
  new ResizeObserver(() => {
    if (element.clientWidth === width) return;
    width = element.clientWidth;
    render();
  }).observe(element);
}

// Theme: the system's, unless the reader chose one. Storage may be refused for files opened from disk.
{
  const names = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const order = Object.keys(names);
  const read = () => { try { return localStorage.getItem("draftattn-theme"); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem("draftattn-theme", theme); } catch { /* only this visit */ } };
  const button = byId("theme");
  let theme = order.includes(read()) ? read() : "auto";
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = names[theme];
    document.dispatchEvent(new CustomEvent("theme"));
  };
  button.addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    keep(theme);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

/** A colour of the style sheet as the canvas needs it: resolved for the theme in force. */
function themeColor(name) {
  const probe = make("span", { style: `color: var(${name})`, hidden: true });
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

// Explanations: any element with data-term="key" becomes a button that opens the text of pageData.glossary[key].
const explanation = make("div", { class: "explanation", id: "explanation", role: "note", hidden: true });
document.body.append(explanation);
let explained = null;

/** A word that explains itself when tapped. */
function makeTerm(key, text) {
  const entry = pageData.glossary[key];
  if (!entry) return make("span", {}, text);
  const button = make("button", {
    type: "button", class: "term", "aria-expanded": "false",
    click: (event) => {
      event.stopPropagation();
      if (explained === button) closeExplanation();
      else explain(button, entry);
    },
  }, text);
  return button;
}

function explain(button, entry) {
  closeExplanation();
  explained = button;
  button.setAttribute("aria-expanded", "true");
  button.setAttribute("aria-describedby", "explanation");
  explanation.replaceChildren(make("b", {}, entry.name), entry.text);
  explanation.hidden = false;
  const at = button.getBoundingClientRect();
  const { width, height } = explanation.getBoundingClientRect();
  const top = at.bottom + 8 + height < innerHeight ? at.bottom + 8 : at.top - height - 8;
  explanation.style.left = `${clamp(at.left, 12, Math.max(12, innerWidth - width - 12))}px`;
  explanation.style.top = `${clamp(top, 8, Math.max(8, innerHeight - height - 8))}px`;
}

function closeExplanation() {
  explained?.setAttribute("aria-expanded", "false");
  explained?.removeAttribute("aria-describedby");
  explained = null;
  explanation.hidden = true;
}

addEventListener("scroll", closeExplanation, { passive: true });
addEventListener("resize", closeExplanation);
addEventListener("keydown", (event) => { if (event.key === "Escape") closeExplanation(); });
addEventListener("pointerdown", (event) => {
  if (explained && !explanation.contains(event.target) && event.target !== explained) closeExplanation();
});

/** Makes the words marked inside an element explain themselves. */
function activateTerms(root) {
  for (const element of root.querySelectorAll("[data-term]")) {
    element.replaceWith(makeTerm(element.dataset.term, element.textContent));
  }
}
activateTerms(document);

// One tooltip for the whole page.
const tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
document.body.append(tip);

/** Shows the tooltip near a point of the window; an empty text hides it. */
function showTip(text, x = 0, y = 0) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${clamp(x + 14, 4, innerWidth - tip.offsetWidth - 6)}px`;
  tip.style.top = `${clamp(y - tip.offsetHeight - 12, 4, innerHeight - tip.offsetHeight - 4)}px`;
}
