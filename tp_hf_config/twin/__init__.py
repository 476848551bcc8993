"""Find which tensor dims lose the same units, by experiments on a tiny model.

Permutations and masked checks prove what is found. Nothing here uses Torch-Pruning.
"""
