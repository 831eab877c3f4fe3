"""What a run took: measured time and memory, and the cost that follows from a price."""
