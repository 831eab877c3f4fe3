"""Text embeddings: save, load, cached encode."""
