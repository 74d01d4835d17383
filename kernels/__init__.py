"""Functions from tensors to tensors, each with a plain-torch reference."""
