// The template browser lists a pack's templates in the order of its server's folder, which is no order on some
// systems: ours are numbered in the order of learning, and come in it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PACK = new URL(import.meta.url).pathname.split("/").at(-2); // the folder's name under custom_nodes

app.registerExtension({
  name: "pastiche.templates",
  init() {
    const ask = api.getWorkflowTemplates.bind(api);
    api.getWorkflowTemplates = async () => {
      const found = await ask();
      found?.[PACK]?.sort?.();
      return found;
    };
  },
});
