"""Pruning during training: an optimizer that follows it, and a ``Trainer`` callback."""
