// One step of a task on the page: the task, the streamed thought, the action, and the measurements.
import { certainThought, parse } from "./actions.js";
import { draw, toPixel } from "./overlay.js";
import { say } from "./strings.js";

/** Creates an element with properties and children. */
export function build(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", `#i-${name}`);
  return svg;
}

const ICONS = { Type_Name: "Type" };
export const actionIcon = (action) => icon(ICONS[action.name] ?? action.name.replace(" ", "-"));

/** An action's arguments as text: points, then strings. */
export function details(action) {
  const { name, element, start, end, ...words } = action;
  const places = [element, start && [...start, "→", ...end]].filter(Boolean);
  const texts = name === "Note" ? [] : Object.values(words).filter(Boolean);
  return [...places.map((place) => place.join(", ").replace(", →, ", " → ")), ...texts].join(" · ");
}

const rounded = (value) => (value < 10 ? Number(value.toFixed(1)) : Math.round(value));
const STAGES = ["queue", "preprocess", "vision", "audio", "prefill", "decode"];

export class Step {
  /** `words` is the task, `screen` is {url, width, height} or null, `seconds` is the length of the recording or 0. */
  constructor(number, { words, screen, seconds }) {
    Object.assign(this, { number, screen, action: null, answer: "" });
    this.thought = build("p", { className: "thought streaming" });
    this.thought.setAttribute("aria-live", "polite");
    this.body = build("div", { className: "body" }, build("h2", { textContent: say("step", { n: number }) }));
    if (words) this.body.append(build("p", { className: "asked", textContent: words }));
    if (seconds) {
      const length = say("speech", { n: seconds.toFixed(1) });
      this.body.append(build("p", { className: "asked" }, icon("mic"), length));
    }
    this.body.append(this.thought);
    this.node = build("li", { className: "step" }, this.body);
    if (!screen) return;
    this.marks = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.marks.setAttribute("class", "marks");
    this.button = build("button", { type: "button", className: "thumb" }, build("img", { src: screen.url, alt: "" }));
    this.button.append(this.marks);
    this.button.setAttribute("aria-label", say("showStep", { n: number }));
    this.node.prepend(this.button);
  }

  /** Shows the transcripts of the step's recording. */
  addTranscripts(transcripts) {
    const text = say("transcript", { text: transcripts.join(" ") });
    this.thought.before(build("p", { className: "transcript", textContent: text }));
  }

  /** Appends a piece of the answer, and shows the part of the thought that is certain. */
  add(piece) {
    this.answer += piece;
    const shown = this.thought.textContent.length;
    const thought = certainThought(this.answer);
    if (thought.length > shown) this.thought.append(thought.slice(shown)); // only the new part, for screen readers
  }

  /** Shows the action, and returns a description of it. */
  finish(reason) {
    const { thought, action, error } = parse(this.answer);
    this.thought.classList.remove("streaming");
    if (this.thought.textContent !== thought) this.thought.textContent = thought;
    this.action = action;
    if (action) this.body.append(this.chip(action));
    else this.warn(say("noAction"), reason === "length" ? say("cut") : error);
    if (this.marks) draw(this.marks, action, this.screen);
    return action ? `${say(action.name)} ${details(action)}` : say("noAction");
  }

  chip(action) {
    const chip = build("p", { className: `chip ${action.name.toLowerCase()}` }, actionIcon(action));
    chip.append(build("span", {}, build("strong", { textContent: say(action.name) }), ` ${details(action)}`));
    return chip;
  }

  /** Shows that the step has failed. */
  fail(title, message = "") {
    this.thought.classList.remove("streaming");
    this.node.classList.add("failed");
    this.warn(title, message);
  }

  warn(title, message) {
    const text = build("span", {}, build("strong", { textContent: title }), message && ` ${message}`);
    this.body.append(build("p", { className: "warning", role: "alert" }, icon("warn"), text));
  }

  /** Times are in milliseconds: `first` token and `total`. `usage` is the server's, or null. */
  figures({ first, total }, usage) {
    const tokens = usage?.completion_tokens;
    const figures = [];
    if (first !== null) figures.push([`${rounded(first)} ms`, say("first")]);
    figures.push([`${rounded(total)} ms`, say("total")]);
    const span = usage?.timings?.decode_ms || total - first; // prefer the server's time: pieces may arrive in bursts
    if (tokens > 1 && span > 0) figures.push([Math.round(((tokens - 1) * 1000) / span), say("speed")]);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens;
      figures.push([usage.prompt_tokens, cached ? `${say("input")} (${say("cached", { n: cached })})` : say("input")]);
      figures.push([tokens, say("output")]);
    }
    const items = figures.map(([value, name]) => build("li", {}, build("b", { textContent: value }), ` ${name}`));
    const raw = build("details", { className: "raw" }, build("summary", { textContent: say("raw") }));
    raw.append(build("pre", { textContent: this.answer }));
    const list = build("ul", { className: "figures" }, ...items);
    this.node.append(build("div", { className: "measures" }, list, ...stages(usage?.timings ?? {}), raw));
  }

  /** The line below the screenshot: the action's points in pixels. */
  pixels() {
    const places = [this.action?.element, this.action?.start, this.action?.end].filter(Boolean);
    if (!places.length) return "";
    return `${say("pixel")} ${places.map((place) => toPixel(place, this.screen).join(", ")).join(" → ")}`;
  }
}

/** A bar of the server's milliseconds by stage (usage.timings) and its legend; nothing if all are below 0.5. */
function stages(timings) {
  const times = STAGES.map((name) => [name, timings[`${name}_ms`]]).filter(([, time]) => time >= 0.5);
  if (!times.length) return [];
  const bar = build("div", { className: "stages" });
  bar.setAttribute("aria-hidden", "true");
  const legend = build("ul", { className: "figures legend" }, build("li", { textContent: "ms" }));
  for (const [name, time] of times) {
    const part = build("i", { className: name });
    part.style.flexGrow = time;
    bar.append(part);
    const text = [build("b", { textContent: rounded(time) }), ` ${say(name)}`];
    legend.append(build("li", {}, build("i", { className: name }), ...text));
  }
  return [bar, legend];
}
