"""Number formats of weights: encode, decode, multiply."""
