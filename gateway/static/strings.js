// The page's texts, in English and in Chinese. The language is the browser's first.

const STRINGS = {
  title: ["AutoGLM-Phone playground", "AutoGLM-Phone 演练场"],
  newTask: ["New task", "新任务"],
  screenshot: ["Screenshot", "截图"],
  conversation: ["Conversation", "对话"],
  dropHere: ["Drop, paste or choose a screenshot", "拖入、粘贴或选择一张截图"],
  intro: [
    "Add a screenshot and a task. The thought streams in, the action is drawn. Then add the next screenshot.",
    "给一张截图和一个任务：思考会逐字出现，动作会画在屏幕上。然后放入下一张截图，继续下一步。",
  ],
  task: ["Task", "任务"],
  taskHint: ["What should be done?", "要做什么？"],
  nextHint: ["Add the next screenshot, then send", "换下一张截图再发送"],
  chooseImage: ["Choose a screenshot", "选择截图"],
  record: ["Record the task", "录制语音任务"],
  recordEnd: ["Stop recording", "停止录音"],
  dropSpeech: ["Remove the recording", "删除录音"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  options: ["Options", "选项"],
  apiKey: ["API key", "API 密钥"],
  model: ["Model", "模型"],
  currentApp: ["Current app (sent to the model)", "当前应用（告诉模型）"],
  system: ["System prompt (none if empty)", "系统提示词（留空则不发送）"],
  optionsNote: [
    "Empty fields use the server's defaults. Closing the tab clears all settings.",
    "留空的选项由服务器决定。关闭标签页后全部清除。",
  ],
  keyNeeded: ["API key required", "需要 API 密钥"],
  offline: ["server not reachable", "服务器没有响应"],
  step: ["Step {n}", "第 {n} 步"],
  showStep: ["Show step {n}", "查看第 {n} 步"],
  speech: ["Speech, {n} s", "语音 {n} 秒"],
  transcript: ["Transcript: “{text}”", "听到：“{text}”"],
  thinking: ["Thinking", "思考中"],
  recording: ["Recording", "录音中"],
  stopped: ["Stopped", "已停止"],
  cut: ["The answer was cut off at the token limit.", "回答因达到 token 上限而被截断。"],
  noAction: ["No valid action", "没有读到动作"],
  raw: ["Raw answer", "原始回答"],
  first: ["first token", "首个 token"],
  total: ["total", "总计"],
  speed: ["tokens/s", "token/秒"],
  input: ["in", "输入"],
  cached: ["{n} cached", "{n} 来自缓存"],
  output: ["out", "输出"],
  pixel: ["pixel", "像素"],
  queue: ["queue", "排队"],
  preprocess: ["preprocess", "预处理"],
  vision: ["vision", "视觉"],
  audio: ["audio", "语音"],
  prefill: ["prefill", "预填充"],
  decode: ["decode", "解码"],
  needTask: ["Type or record a task.", "请输入或录制任务。"],
  notImage: ["{name} is not an image or audio file that this browser can read.", "{name} 不是浏览器能读取的图片或声音。"],
  noMicrophone: ["The microphone cannot be used: {reason}", "无法使用麦克风：{reason}"],
  insecure: ["recording requires HTTPS or localhost", "需要 HTTPS 或 localhost"],
  errorSpeech: ["The server does not support speech", "服务器不支持语音"],
  error0: ["The server cannot be reached", "无法连接服务器"],
  error400: ["The server refused the request", "服务器拒绝了请求"],
  error401: ["The API key was not accepted", "API 密钥未被接受"],
  error413: ["The request is too large", "请求过大"],
  error429: ["The server is busy", "服务器繁忙"],
  error500: ["The server failed", "服务器出错"],
  retryAfter: ["Try again in {n} s.", "请在 {n} 秒后重试。"],
  Launch: ["Launch", "启动"],
  Tap: ["Tap", "点击"],
  Type: ["Type", "输入"],
  Type_Name: ["Type a name", "输入姓名"],
  Swipe: ["Swipe", "滑动"],
  Back: ["Back", "返回"],
  Home: ["Home", "回到桌面"],
  "Double Tap": ["Double tap", "双击"],
  "Long Press": ["Long press", "长按"],
  Wait: ["Wait", "等待"],
  Take_over: ["Your turn", "请接管"],
  Note: ["Note the page", "记录页面"],
  Call_API: ["Summarise", "总结"],
  Interact: ["Which one?", "请选择"],
  finish: ["Finished", "完成"],
};

const column = navigator.language.toLowerCase().startsWith("zh") ? 1 : 0;

/** The text of `key` with its {names} filled in, or the key itself if it has no text. */
export function say(key, values = {}) {
  const text = STRINGS[key]?.[column] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Sets a page's texts: data-say is an element's text, data-label its accessible name, data-hint its placeholder. */
export function translate(page) {
  page.documentElement.lang = ["en", "zh-CN"][column];
  page.title = say("title");
  for (const node of page.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of page.querySelectorAll("[data-label]")) label(node, node.dataset.label);
  for (const node of page.querySelectorAll("[data-hint]")) node.placeholder = say(node.dataset.hint);
}

/** Sets an element's accessible name, and a button's tooltip. */
export function label(node, key) {
  if (node.matches("button")) node.title = say(key);
  node.setAttribute("aria-label", say(key));
}
