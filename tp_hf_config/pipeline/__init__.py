"""Turn a folder with a model into a folder with a pruned model: read, prune, recover, prove, write.

:mod:`~tp_hf_config.pipeline.prune` runs the steps in order; every other module does one of them.
"""
