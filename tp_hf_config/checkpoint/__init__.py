"""Folders with a config and weights: checked, repaired, verified.

Only headers are read; nothing here touches a live model.
"""
