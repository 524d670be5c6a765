// Requests to the server of this page: the list of models, and streamed chat completions.

/** An error response, or with status 0 a connection that failed. */
export class ServerError extends Error {
  constructor(status, { message, param = null } = {}, retryAfter = null) {
    super(message || "");
    Object.assign(this, { status, param, retryAfter });
  }
}

async function request(path, key, init = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: error.message });
  }
  if (response.ok) return response;
  const body = await response.text();
  let error = { message: body.slice(0, 300) };
  try {
    error = JSON.parse(body).error ?? error;
  } catch {
    // Not JSON, such as the page of a proxy: show its beginning.
  }
  throw new ServerError(response.status, error, response.headers.get("Retry-After"));
}

/** The names of the served models. */
export async function models(key) {
  const { data } = await (await request("v1/models", key)).json();
  return data.map((model) => model.id);
}

/** Yields the chunks of a streamed answer. Leaving the loop, or `signal`, closes the connection. */
export async function* chat(options, key, signal) {
  const body = JSON.stringify({ ...options, stream: true, stream_options: { include_usage: true } });
  const response = await request("v1/chat/completions", key, { method: "POST", body, signal });
  try {
    yield* events(response.body.pipeThrough(new TextDecoderStream()));
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ServerError(0, { message: error.message }); // the connection broke, or the data is not JSON
  }
}

async function* events(stream) {
  let buffer = "";
  for await (const text of pieces(stream)) {
    const lines = (buffer + text).split(/\r?\n/);
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep the connection alive; blank lines end events
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(Number(chunk.error.code) || 500, chunk.error);
      yield chunk;
    }
  }
  throw new Error("the stream ended before [DONE]");
}

async function* pieces(stream) {
  const reader = stream.getReader(); // Safari cannot iterate a stream
  try {
    for (let next; !(next = await reader.read()).done; ) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
