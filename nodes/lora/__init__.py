"""LoRAs that are not merged into the weights."""
