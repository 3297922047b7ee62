// Where the page begins: which of its two views this is, how the feed is doing, and the way out.

import { byId, setText } from "./dom.js";
import { signOut } from "./net.js";

const STATES = {
  live: "Live",
  lost: "Connection lost, trying again",
  full: "All places for watchers are taken, trying again",
};

function show(view, title) {
  document.title = `${title} · opensourcellmrouter`;
  byId(view).hidden = false;
  byId(`to-${view}`).setAttribute("aria-current", "page");
}

export function connection(state) {
  byId("connection").dataset.state = state;
  setText(byId("connection"), STATES[state] ?? "");
}

if (localStorage.getItem("signed-in")) {
  byId("sign-out").hidden = false;
  byId("sign-out").addEventListener("click", () => {
    localStorage.removeItem("signed-in");
    signOut();
  });
}

if (location.pathname.endsWith("/observability")) {
  show("observability", "Observability");
  byId("connection").hidden = true;
  const { startObservability } = await import("./observability.js");
  startObservability(byId("observability"));
} else {
  show("requests", "Requests");
  const { startRequests } = await import("./requests.js");
  startRequests(connection);
}
