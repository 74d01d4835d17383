"""Tickets in (or prompts, colocated), tokens out."""
