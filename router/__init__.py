"""Every public API: render, tokenize, route, stream."""
