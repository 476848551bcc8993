"""Check, repair and verify folders that hold a config.json and weights.

Checking and repairing read headers of the weights files (and samples of tied tensors). Verifying
loads and runs the folder in a fresh process.
"""
