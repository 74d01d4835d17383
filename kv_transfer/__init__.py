"""Moves KV blocks between two pools exactly, or says clearly that it did not."""
