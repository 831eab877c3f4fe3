"""Video that never is whole in memory: chunks of a causal VAE, tiles, files."""
