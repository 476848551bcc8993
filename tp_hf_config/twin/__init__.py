"""Find and prove, on a tiny model, which tensor dims lose the same units; without Torch-Pruning."""
