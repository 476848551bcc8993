"""The shell command ``tp-hf-config``: arguments, output and exit codes, never logic.

A command is a module with ``HELP``, ``add(parser)`` and ``run(options)``; nothing heavy is imported
before ``run``.
"""
