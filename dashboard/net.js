// Talking to the router: its API, and its feed. All addresses are relative to this file, whatever prefix it is served under.

const HERE = new URL("./", import.meta.url);
const API = new URL("../api/v1/", HERE);
const SILENCE = 40_000; // the feed says something every 15 s; one that does not is gone

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The router answered ${status}.`);
    this.status = status;
    this.body = body;
    this.param = body?.error?.param ?? null;
  }
}

// A JSON request to the API. Throws ApiError; without a valid session the page makes room for the sign-in page.
export async function api(path, { method = "GET", body, signal } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(new URL(path, API), {
      method, headers, signal, cache: "no-store", credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: { message: "The router does not answer." } });
  }
  if (response.status === 401) location.reload();
  const told = await response.json().catch(() => null);
  if (!response.ok || told === null) throw new ApiError(response.status, told);
  return told;
}

export async function signOut() {
  await fetch(new URL("session", HERE), { method: "DELETE", credentials: "same-origin" });
  location.reload();
}

// Follows the feed until the signal ends it: tells every event, and how the connection is: live, lost, or full.
export async function follow({ lastEventId, onEvent, onState, signal }) {
  const seen = { id: lastEventId };
  let tries = 0;
  while (!signal.aborted) {
    let [state, wait] = ["lost", Math.min(10_000, 500 * 2 ** tries)];
    tries += 1;
    try {
      const response = await open(seen, signal);
      if (response.status === 401) location.reload();
      if (response.ok) {
        onState("live");
        tries = 0;
        await read(response.body, seen, onEvent);
      } else if (response.status === 503) {
        [state, wait] = ["full", 1000 * (Number(response.headers.get("Retry-After")) || 5)];
      }
    } catch (error) {
      if (!signal.aborted) console.warn("the feed broke off:", error.message);
    }
    if (signal.aborted) return;
    onState(state);
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

function open(seen, signal) {
  const headers = { Accept: "text/event-stream" };
  if (seen.id) headers["Last-Event-ID"] = seen.id;
  return fetch(new URL("events", HERE), { headers, signal, cache: "no-store", credentials: "same-origin" });
}

async function read(body, seen, onEvent) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const timer = setTimeout(() => reader.cancel(), SILENCE);
    const { done, value } = await reader.read();
    clearTimeout(timer);
    if (done) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) hear(block, seen, onEvent);
  }
}

function hear(block, seen, onEvent) {
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("data: ")) data += line.slice(6);
    else if (line.startsWith("id: ")) seen.id = line.slice(4);
  }
  if (data) onEvent(JSON.parse(data));
}
