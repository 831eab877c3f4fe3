"""LoRA files: names of layers, low-rank products, reports."""
