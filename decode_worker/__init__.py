"""Starts a worker in the role of the one that decodes (colocated: that does both)."""
