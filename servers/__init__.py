"""Other processes: chat and video servers that a person named, and the fleet."""
