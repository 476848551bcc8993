"""Check, repair and verify folders that hold a config.json and weights.

Checking and repairing read the headers of the weights files (and samples of tied tensors), and need
no live model. Verifying loads and runs the folder in a fresh process.
"""
