"""Checkpoints: their folder and manifest, the layout of tensors in files, writing and reading."""
