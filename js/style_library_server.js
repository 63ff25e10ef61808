// What the style library asks of ComfyUI's own server: its list, its pictures, and the node that deletes.
import { api } from "../../scripts/api.js";

const NODE = "PasticheStyleLibrary";
const MANAGER = "PasticheManageStyles";
const PAGE = "pastiche_library"; // see nodes/library.py
const ID = "pastiche_style_library"; // no node on any canvas has it
const POLL = 300; // milliseconds

/** {styles, total, limit}: every entry as nodes/host/features/shelf.py tells of it; sizes in bytes, limit 0 is none. */
export async function fetchLibrary() {
  const response = await api.fetchApi(`/object_info/${NODE}`, { cache: "no-store" });
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return (await response.json())[NODE].input.required.style[1][PAGE];
}

/** Address of an entry's picture, or "". */
export function pictureUrl(style) {
  if (style.kind === "ready") return new URL(`./styles/${encodeURIComponent(style.title)}.jpg`, import.meta.url).href;
  if (!style.cover) return "";
  const file = style.file.split("/").map(encodeURIComponent).join("/");
  return api.apiURL(`/experiment/models/preview/${style.folder}/${style.index}/${file}?t=${style.modified}`);
}

export const deleteStyle = ({ key, size, modified }, still) => manage({ action: "delete", style: key, size, modified }, still);
export const setLimit = (megabytes, still) => manage({ action: "limit", limit_mb: megabytes }, still);

/**
 * Runs Manage Style Library, in front of what else is queued, and waits until it has; throws with the node's sentence.
 * Without this page's client id: its canvas hears nothing of it. `still` false ends the waiting.
 */
async function manage(inputs, still = () => true) {
  const node = { class_type: MANAGER, inputs: { style: "", size: 0, modified: 0, limit_mb: 0, ...inputs } };
  const post = (path, body) =>
    api.fetchApi(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const asked = await post("/prompt", { prompt: { [ID]: node }, front: true });
  const answer = await asked.json();
  if (!asked.ok) {
    const details = Object.values(answer.node_errors ?? {}).flatMap((found) => found.errors.map((error) => error.details));
    throw new Error([answer.error?.message, ...details].filter(Boolean).join(" "));
  }
  while (still()) {
    const entry = (await (await api.fetchApi(`/history/${answer.prompt_id}`)).json())[answer.prompt_id];
    if (entry) {
      await post("/history", { delete: [answer.prompt_id] }); // it is no picture of the user's
      const failed = entry.status?.messages?.find(([kind]) => kind === "execution_error");
      if (failed) throw new Error(failed[1].exception_message.trim());
      return;
    }
    await new Promise((done) => setTimeout(done, POLL));
  }
}
