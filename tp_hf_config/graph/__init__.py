"""Dependency groups at full size, and Torch-Pruning's ``DependencyGraph`` built from them."""
