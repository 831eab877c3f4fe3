"""Load a Wan model, and join two experts."""
