// The action language, parsed as by client/autoglm_client/{actions,parser,thought}.py; a test compares the two.

/** Arguments and defaults of each action; a required argument has the default `undefined`. */
const ARGUMENTS = {
  Launch: { app: undefined },
  Tap: { element: undefined, message: null },
  Type: { text: undefined },
  Type_Name: { text: undefined },
  Swipe: { start: undefined, end: undefined },
  Back: {},
  Home: {},
  "Double Tap": { element: undefined },
  "Long Press": { element: undefined },
  Wait: { duration: "1 seconds" },
  Take_over: { message: "" },
  Note: { message: "True" },
  Call_API: { instruction: undefined },
  Interact: {},
  finish: { message: "" },
};
const POINTS = ["element", "start", "end"]; // every other argument is a string
export const COORDINATES = 1000;

const TAGGED_CALL = /<answer>\s*(?=(?:do|finish)\s*\()/;
const BARE_CALL = /do\(\s*\w+\s*=|finish\(\s*(?:message\s*=|\))/g;
const LEADING = /^(?:\s|<think>)+/;
const TRAILING = /(?:\s|<\/?think>|<\/?answer>)+$/;
const clean = (thought) => thought.replace(LEADING, "").replace(TRAILING, "");

/** The thought without its tags, and the index of the call (-1: none). */
function findAction(text) {
  const tagged = TAGGED_CALL.exec(text);
  if (tagged) return [clean(text.slice(0, tagged.index)), tagged.index + tagged[0].length];
  BARE_CALL.lastIndex = text.lastIndexOf("</think>") + 1;
  const bare = BARE_CALL.exec(text);
  if (bare) return [clean(text.slice(0, bare.index)), bare.index];
  return [clean(text.split("<answer>", 1)[0]), -1];
}

/** {thought, action: {name, ...arguments}}, points as [x, y]; action is null if there is an `error`. */
export function parse(text) {
  const [thought, start] = findAction(text);
  try {
    if (start < 0) throw new SyntaxError("no action: expected do(...) or finish(...)");
    return { thought, action: read(text, start) };
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return { thought, action: null, error: error.message };
  }
}

// One argument and its separator. Models do not always escape quotes inside a string: a quote ends the string only
// where the call can continue.
const ARGUMENT = new RegExp(
  String.raw`\s*(?<name>[A-Za-z_]+)\s*=\s*(?:(?<quote>["'])(?<text>(?:\\.|[^\\])*?)\k<quote>` +
    String.raw`|\[\s*(?<x>-?\d+)\s*,\s*(?<y>-?\d+)\s*\]|\(\s*(?<x2>-?\d+)\s*,\s*(?<y2>-?\d+)\s*\)` +
    String.raw`|(?<bare>-?\d+(?:\.\d+)?|True|False))\s*(?:,(?=\s*[A-Za-z_]+\s*=)|(?<end>\)\s*(?:</answer>\s*)?$))`,
  "sy",
);
const ESCAPE = /\\(u[0-9a-fA-F]{4}|[\\"'nrt])/g;
const ESCAPED = { n: "\n", r: "\r", t: "\t" };

function read(text, start) {
  const [opening, verb] = /^(\w+)\s*\(\s*/.exec(text.slice(start));
  const given = new Map();
  let at = start + opening.length;
  let ended = /^\)\s*(?:<\/answer>\s*)?$/.test(text.slice(at));
  while (!ended) {
    ARGUMENT.lastIndex = at;
    const found = ARGUMENT.exec(text)?.groups;
    if (!found || given.has(found.name)) throw new SyntaxError(`invalid argument: ${text.slice(at, at + 40)}`);
    given.set(found.name, valueOf(found));
    at = ARGUMENT.lastIndex;
    ended = found.end !== undefined;
  }
  const name = verb === "finish" ? verb : given.get("action");
  if (verb === "do") given.delete("action");
  if (!Object.hasOwn(ARGUMENTS, String(name)) || (verb === "do" && name === "finish"))
    throw new SyntaxError(`${JSON.stringify(name ?? "")} is not a known action`);
  for (const key of given.keys())
    if (!Object.hasOwn(ARGUMENTS[name], key)) throw new SyntaxError(`${name} has no argument ${key}`);
  const action = { name, ...ARGUMENTS[name], ...Object.fromEntries(given) };
  const missing = Object.keys(action).find((key) => action[key] === undefined);
  if (missing) throw new SyntaxError(`${name} requires the argument ${missing}`);
  return action;
}

function valueOf({ name, text, x, y, x2, y2, bare }) {
  const point = x ?? x2;
  const accepted = POINTS.includes(name) ? "a point [x,y]" : "a string";
  if (POINTS.includes(name) !== (point !== undefined)) throw new SyntaxError(`${name} must be ${accepted}`);
  if (text !== undefined) return unescape(text);
  if (bare !== undefined) return bare;
  const coordinates = [Number(point), Number(y ?? y2)];
  const outside = coordinates.find((value) => value < 0 || value >= COORDINATES);
  if (outside !== undefined) throw new SyntaxError(`${name} must be within 0 to ${COORDINATES - 1} (got ${outside})`);
  return coordinates;
}

function unescape(text) {
  const character = (_, c) => (c[0] === "u" ? String.fromCharCode(parseInt(c.slice(1), 16)) : (ESCAPED[c] ?? c));
  return text.replace(ESCAPE, character).toWellFormed();
}

const END_OF_THOUGHT = /<answer>|do\(action=|finish\(message=/;
const MARKS = ["<think>", "</think>", "<answer>", "do(action=", "finish(message="];

/** The thought of an incomplete answer, without an end that may become a tag or a call. It only grows. */
export function certainThought(text) {
  const end = END_OF_THOUGHT.exec(text)?.index ?? text.length - uncertain(text);
  return text.slice(0, end).replace(/<\/?think>/g, "").trim();
}

function uncertain(text) {
  let length = Math.min(text.length, 14); // length of the longest mark, minus one
  while (length && !MARKS.some((mark) => mark.startsWith(text.slice(-length)))) length--;
  return length;
}

/** An answer as phone agents write it into their history: with doubled tags, which the model expects. */
export function toHistory(text) {
  const wrap = (thought, action) => `<think>${thought}</think><answer>${action}</answer>`;
  for (const mark of ["finish(message=", "do(action="]) {
    const at = text.indexOf(mark);
    if (at >= 0) return wrap(text.slice(0, at).trim(), text.slice(at));
  }
  const at = text.indexOf("<answer>");
  if (at < 0) return wrap("", text);
  return wrap(text.slice(0, at).replace(/<\/?think>/g, "").trim(), text.slice(at + 8).replace("</answer>", "").trim());
}
