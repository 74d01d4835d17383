"""Prompts in, tickets out."""
