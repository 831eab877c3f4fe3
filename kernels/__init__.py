"""Tensors without ComfyUI: file formats, attention, caches, masks, memory plans."""
