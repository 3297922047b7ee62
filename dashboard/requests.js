// The view of the requests: the feed at one side, at the other the overview or the request that was chosen.

import { showDetail } from "./detail.js";
import { byId } from "./dom.js";
import { Feed } from "./feed.js";
import { Overview } from "./overview.js";

// The address names the chosen request (#request-12), so that going back works and it can be passed on.
const chosen = () => Number(/^#request-(\d+)$/.exec(location.hash)?.[1] ?? 0) || null;

export function startRequests(onState) {
  const view = byId("requests");
  const overview = new Overview();
  const feed = new Feed((id) => {
    location.hash = id === chosen() ? "" : `#request-${id}`;
  });

  const pane = (name) => {
    view.dataset.pane = name;
    for (const button of view.querySelectorAll("[data-show]")) button.setAttribute("aria-pressed", String(button.dataset.show === name));
  };

  const close = () => {
    const id = chosen();
    history.pushState(null, "", location.pathname + location.search);
    arrange();
    feed.focusCard(id);
  };

  const arrange = async () => {
    const id = chosen();
    feed.select(id);
    byId("detail").hidden = !id;
    byId("overview").hidden = Boolean(id);
    pane(id ? "detail" : view.dataset.pane === "overview" ? "overview" : "feed");
    if (!id) return overview.refresh();
    return showDetail(byId("detail"), id, close);
  };

  view.addEventListener("click", (event) => {
    const button = event.target.closest("[data-show]");
    if (!button) return;
    pane(button.dataset.show);
    if (button.dataset.show === "overview") overview.refresh();
  });
  view.addEventListener("keydown", (event) => event.key === "Escape" && chosen() && !event.target.closest("dialog") && close());
  window.addEventListener("hashchange", arrange);
  window.addEventListener("popstate", arrange);
  arrange();
  feed.start(onState);
}
