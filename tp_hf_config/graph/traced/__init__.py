"""Torch-Pruning's own trace, made safe, and the proof of its groups.

The rest of ``graph`` does not import this folder, so it can be taken out as a whole.
"""
