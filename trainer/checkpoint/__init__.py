"""Checkpoints: the folder and its manifest, the layout of tensors in files, reading and writing them."""
