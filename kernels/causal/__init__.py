"""Keys and values of causal video attention, kept in pages of one latent frame of one layer."""
