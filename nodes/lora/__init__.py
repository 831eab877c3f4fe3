"""LoRA beside the weights."""
