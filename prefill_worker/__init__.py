"""Starts a worker in the role of the one that prefills."""
