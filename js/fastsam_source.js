// Which picture a node's image input will get, as far as the browser can know before a run.
import { api } from "../../scripts/api.js";

const DEPTH = 20;
const SUBGRAPH_INPUT = -10; // the id that a link from a subgraph's boundary has as its origin

/** Address of a file that ComfyUI serves. */
export function viewUrl({ filename, subfolder = "", type = "input" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/**
 * The picture behind an input: {url, exact}, or null. `exact` is false where nodes lie between that may
 * have changed its size.
 */
export function findSource(node, inputName) {
  let exact = true;
  let current = origin(node, node.inputs?.findIndex((input) => input.name === inputName) ?? -1);
  for (let depth = 0; current && depth < DEPTH; depth++) {
    const file = chosenFile(current);
    if (file) return { url: viewUrl(file), exact };
    if (current.pasticheSource) return { url: current.pasticheSource, exact }; // Sample Picture
    if (current.imgs?.length && !current.isVirtualNode) return { url: current.imgs[0].src, exact };
    if (!isReroute(current)) exact = false;
    const next = (current.inputs ?? []).findIndex((input) => input.link != null && (isReroute(current) || input.type === "IMAGE"));
    current = origin(current, next);
  }
  return null;
}

/** The node behind an input, looked for through the boundaries of subgraphs, both ways. */
function origin(node, slot) {
  if (slot < 0) return null;
  const link = node.graph?.getLink?.(node.inputs[slot].link) ?? node.graph?.links?.[node.inputs[slot].link];
  if (!link) return null;
  if (Number(link.origin_id) === SUBGRAPH_INPUT) return throughInput(node.graph, link.origin_slot);
  const found = node.graph.getNodeById(link.origin_id) ?? null;
  return found?.isSubgraphNode?.() ? (found.resolveSubgraphOutputLink?.(link.origin_slot)?.outputNode ?? null) : found;
}

/** What the nodes that show `subgraph` have connected to one of its inputs: the first that has anything. */
function throughInput(subgraph, slot) {
  const root = subgraph.rootGraph;
  for (const graph of [root, ...(root?.subgraphs?.values?.() ?? [])])
    for (const shown of graph?.nodes ?? [])
      if (shown.subgraph === subgraph) {
        const found = origin(shown, shown.inputs?.[slot] ? slot : -1);
        if (found) return found;
      }
  return null;
}

const isReroute = (node) => node.type === "Reroute" || node.isVirtualNode === true;

/** The file of a Load Image or its relatives: their `image` widget, "folder/name.png [output]". */
function chosenFile(node) {
  if (!/^Load\w*Image/.test(node.type ?? "")) return null;
  const value = node.widgets?.find((widget) => widget.name === "image")?.value;
  if (typeof value !== "string" || !value) return null;
  const [, path, type] = /^(.*?)(?: \[(input|output|temp)\])?$/s.exec(value);
  const cut = path.lastIndexOf("/");
  return { filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(0, cut)), type: type ?? "input" };
}
