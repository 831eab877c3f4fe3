"""Compiling the blocks of a transformer while their weights stay wherever the host keeps them."""
