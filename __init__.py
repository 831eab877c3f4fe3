"""ComfyUI-Frugal: Wan 2.1 video and CatVTON try-on on the card people already own."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Entry point of the V3 API; nothing is imported before ComfyUI asks for it."""
    from .nodes import FrugalExtension

    return FrugalExtension()
