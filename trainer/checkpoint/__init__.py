"""Checkpoints: their folder and manifest, the file layout of their tensors, writing and reading."""
