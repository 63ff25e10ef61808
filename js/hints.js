// What a Pastiche node has to say about a run that can hardly give what its user wants: a note on the page that
// stays a while, and the sentence under the node until the next run.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "pastiche.hint"; // see nodes/host/messages.py
const LIFE = 30000; // milliseconds: sentences are to be read, and acted on
const TEXT = "$$node-text-preview"; // the front end's widget for a node's progress text

app.registerExtension({
  name: "pastiche.hints",
  setup() {
    const told = new Set();
    api.addEventListener(EVENT, ({ detail: { node, title, text } }) => {
      if (node != null) told.add(String(node));
      app.extensionManager.toast.add({ severity: "warn", summary: `Pastiche: ${title}`, detail: text, life: LIFE });
    });
    api.addEventListener("execution_start", () => {
      told.forEach(forget);
      told.clear();
    });
  },
});

/** Takes the last run's sentence off a node; `id` may lead through subgraphs, "3:7". */
function forget(id) {
  const path = id.split(":");
  let graph = app.rootGraph ?? app.graph;
  while (graph && path.length > 1) graph = graph.getNodeById(Number(path.shift()))?.subgraph;
  const node = graph?.getNodeById(Number(path[0]));
  const widget = node?.widgets?.find((candidate) => candidate.name === TEXT);
  if (widget) node.removeWidget?.(widget);
}
