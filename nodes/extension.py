"""The pack's one ComfyExtension: a literal list of its nodes."""

from comfy_api.latest import ComfyExtension, io

class PasticheExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
        ]


async def comfy_entrypoint() -> PasticheExtension:
    return PasticheExtension()
