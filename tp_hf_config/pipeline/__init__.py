"""From a folder with a model to a folder with a pruned model: read, prune, recover, prove, write.

:mod:`~tp_hf_config.pipeline.prune` knows the order; every other module does one thing of it.
"""
