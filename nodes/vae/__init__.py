"""Decode and encode videos in chunks, to and from files."""
