"""Read a model folder, prune, recover and prove it, and write the pruned folder.

:mod:`~tp_hf_config.pipeline.prune` runs the steps in order; every other module does one of them.
"""
