// A task is a conversation of steps with screenshots, sent to /v1/chat/completions in the format of phone agents.
import { toHistory } from "./actions.js";
import { draw } from "./overlay.js";
import { chat, models, ServerError } from "./server.js";
import { Recorder, toWav } from "./speech.js";
import { actionIcon, build, details, Step } from "./step.js";
import { label, say, translate } from "./strings.js";

const $ = (id) => document.getElementById(id);
const settings = $("settings").elements;
const NUMBERS = [...$("settings").querySelectorAll("input[type=number]")].map((input) => input.name);

const turns = []; // history of the next request: [user parts without the image, the answer]
let taking = null; // the Promise of a file being read
let screen = null; // the newest screenshot: {url, name, file, width, height}
let speech = null; // the recording for the next step: {wav, seconds}
let shown = null; // the step whose screenshot is displayed, or null for the newest screenshot
let recorder = null;
let running = null; // the AbortController of the running request

// --- the stage ---

function show(step) {
  shown = step;
  const visible = step ? step.screen : screen;
  $("shot").parentElement.hidden = !visible;
  $("drop").hidden = Boolean(visible);
  for (const other of document.querySelectorAll(".thumb")) other.removeAttribute("aria-current");
  step?.button?.setAttribute("aria-current", "true");
  const action = step?.action;
  const placed = action?.element || action?.start;
  const words = action && (placed ? action.message : `${say(action.name)} ${details(action)}`);
  $("banner").hidden = !words;
  if (words) $("banner").replaceChildren(actionIcon(action), build("span", { textContent: words }));
  $("facts").textContent = "";
  if (!visible) return;
  $("shot").src = visible.url;
  $("shot").alt = `${say("screenshot")} ${visible.name}`;
  draw($("marks"), action, visible);
  $("facts").textContent = [`${visible.width} × ${visible.height}`, step?.pixels()].filter(Boolean).join(" · ");
}

function take(file) {
  if (file) taking = read(file);
  return taking;
}

async function read(file) {
  try {
    if (file.type.startsWith("audio/")) return setSpeech(await toWav(file));
    const image = new Image();
    image.src = URL.createObjectURL(file);
    await image.decode();
    screen = { url: image.src, name: file.name, file, width: image.naturalWidth, height: image.naturalHeight };
    show(null);
    $("notice").textContent = "";
    $("words").focus();
  } catch {
    $("notice").textContent = say("notImage", { name: file.name });
  }
}

// --- speech ---

function setSpeech(recorded) {
  speech = recorded;
  $("speech").hidden = !speech;
  if (speech) $("speech").querySelector("span").textContent = say("speech", { n: speech.seconds.toFixed(1) });
}

async function record() {
  if (recorder) return recorder.stop();
  try {
    if (!navigator.mediaDevices) throw new Error(say("insecure"));
    recorder = await Recorder.start(async (blob) => {
      recorder = null;
      setRecording(false);
      await take(new File([blob], say("recording"), { type: "audio/webm" }));
    });
    setRecording(true);
  } catch (error) {
    $("notice").textContent = say("noMicrophone", { reason: error.message });
  }
}

function setRecording(on) {
  $("record").classList.toggle("on", on);
  label($("record"), on ? "recordEnd" : "record");
  $("status").textContent = on ? say("recording") : "";
}

// --- requests ---

function dataUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The parts of a user's turn without the image, in the format of Open-AutoGLM. */
async function userParts(words) {
  const app = settings.app.value.trim();
  const info = app && `{"current_app": ${JSON.stringify(app)}}`;
  const task = words || (turns.length ? "** Screen Info **" : "");
  const text = [task, info].filter(Boolean).join("\n\n");
  const parts = text ? [{ type: "text", text }] : [];
  if (!speech) return parts;
  const data = (await dataUrl(speech.wav)).split(",")[1];
  return [{ type: "input_audio", input_audio: { data, format: "wav" } }, ...parts];
}

/** Only the newest turn has its image. Earlier turns are text, and audio, which may contain the task. */
async function requestFor(parts) {
  const messages = turns.flatMap(([content, answer]) => [
    { role: "user", content },
    { role: "assistant", content: toHistory(answer) },
  ]);
  const image = screen && { type: "image_url", image_url: { url: await dataUrl(screen.file) } };
  messages.push({ role: "user", content: image ? [image, ...parts] : parts });
  if (settings.system.value.trim()) messages.unshift({ role: "system", content: settings.system.value });
  const options = NUMBERS.filter((name) => settings[name].value !== "").map((n) => [n, Number(settings[n].value)]);
  return { model: settings.model.value || "autoglm-phone-9b", messages, ...Object.fromEntries(options) };
}

async function send() {
  await recorder?.stop();
  await taking;
  const words = $("words").value.trim();
  if (running) return;
  if (!words && !speech && !turns.length) return needTask();
  const own = new AbortController();
  setRunning(own);
  const sent = speech;
  const parts = await userParts(words);
  const step = new Step($("steps").children.length + 1, { words, screen, seconds: sent?.seconds ?? 0 });
  step.button?.addEventListener("click", () => show(step));
  $("steps").append(step.node);
  $("intro").hidden = true;
  $("words").value = $("notice").textContent = "";
  setSpeech(null);
  show(step);
  step.node.scrollIntoView({ block: "nearest" });
  try {
    await stream(step, await requestFor(parts), own.signal);
    turns.push([parts, step.answer]);
    $("words").placeholder = say("nextHint");
  } catch (error) {
    if (own.signal.reason === "new task") return;
    showError(step, error, Boolean(sent));
    $("words").value ||= words;
    if (sent && !speech && !/audio|speech/i.test(error.message)) setSpeech(sent);
  } finally {
    if (running === own) setRunning(null);
  }
  step.node.scrollIntoView({ block: "nearest" });
  if (shown === step) show(step);
}

async function stream(step, request, signal) {
  const begun = performance.now();
  let first = null;
  let usage = null;
  let reason = null;
  try {
    for await (const chunk of chat(request, settings.key.value, signal)) {
      const [choice] = chunk.choices ?? [];
      usage = chunk.usage ?? usage;
      if (chunk.transcripts) step.addTranscripts(chunk.transcripts);
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta?.content) continue;
      first ??= performance.now() - begun;
      const inView = step.node.getBoundingClientRect().bottom < innerHeight;
      step.add(choice.delta.content);
      if (inView) step.node.scrollIntoView({ block: "nearest" }); // do not scroll if the user has scrolled away
    }
    $("status").textContent = step.finish(reason);
  } finally {
    if (first !== null) step.figures({ first, total: performance.now() - begun }, usage);
  }
}

function showError(step, error, spoken) {
  if (error.name === "AbortError") {
    $("status").textContent = say("stopped");
    return step.fail(say("stopped"));
  }
  if (!(error instanceof ServerError)) throw error;
  const { status, retryAfter, message } = error;
  const kinds = { 401: "error401", 403: "error401", 413: "error413", 429: "error429", 503: "error429" };
  const kind = kinds[status] ?? (status >= 500 ? "error500" : status ? "error400" : "error0");
  const title = spoken && /audio|speech/i.test(message) ? "errorSpeech" : kind;
  const retry = Number(retryAfter) > 0 ? say("retryAfter", { n: retryAfter }) : "";
  step.fail(`${say(title)}.`, [retry, message].filter(Boolean).join(" "));
  if (kind === "error401") $("options").open = true;
}

function needTask() {
  $("notice").textContent = say("needTask");
  $("words").focus();
}

function setRunning(controller) {
  running = controller;
  label($("send"), running ? "stop" : "send");
  $("send").querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
  if (running) $("status").textContent = say("thinking");
}

function newTask() {
  running?.abort("new task");
  setRunning(null);
  turns.length = 0;
  for (const { src } of $("steps").querySelectorAll("img")) if (src !== screen.url) URL.revokeObjectURL(src);
  $("steps").replaceChildren();
  $("intro").hidden = false;
  $("words").placeholder = say("taskHint");
  $("status").textContent = $("notice").textContent = "";
  setSpeech(null);
  show(null);
  $("words").focus();
}

// --- settings, stored until the tab is closed ---

async function connect() {
  try {
    const names = await models(settings.key.value);
    const chosen = settings.model.value || stored.model;
    settings.model.replaceChildren(...names.map((name) => build("option", { textContent: name })));
    if (names.includes(chosen)) settings.model.value = chosen;
    $("served").textContent = names.join(", ");
    $("served").classList.remove("problem");
  } catch (error) {
    $("served").textContent = say(error.status === 401 ? "keyNeeded" : "offline");
    $("served").classList.add("problem");
  }
}

const stored = JSON.parse(sessionStorage.getItem("settings") ?? "{}");
for (const [name, value] of Object.entries(stored)) if (settings[name]) settings[name].value = value;
$("settings").addEventListener("change", ({ target }) => {
  sessionStorage.setItem("settings", JSON.stringify(Object.fromEntries(new FormData($("settings")))));
  if (target.name === "key") connect();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());

// --- events ---

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("words").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) send();
});
addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
for (const button of [$("choose"), $("drop")]) button.addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = "";
});
$("record").addEventListener("click", record);
$("speech").querySelector("button").addEventListener("click", () => {
  setSpeech(null);
  $("record").focus();
});
$("new").addEventListener("click", newTask);
addEventListener("paste", (event) => take(event.clipboardData.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files[0]);
});

translate(document);
connect();
