"""Pruning during training: updating the optimizer, and a ``Trainer`` callback."""
