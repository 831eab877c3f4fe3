"""Everything that can be said without ComfyUI: file formats, tensor maths, masks, geometry."""
