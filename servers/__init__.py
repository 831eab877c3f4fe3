"""Clients of servers that a person named: OpenAI-compatible chat. Nothing here runs unasked."""
