"""The process shell that both kinds of worker share."""
