"""CatVTON without ComfyUI: canvas, latents, masks, 8-bit layers."""
