"""Nodes that speak with a server that the user typed in."""
