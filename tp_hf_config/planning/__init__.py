"""Compute the widths after every step from the user's settings, before any weight is touched."""
