"""Decoder models, composed from kernels."""
