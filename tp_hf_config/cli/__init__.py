"""The shell command ``tp-hf-config``: arguments, output and exit codes, no other logic.

Each command is a module with ``HELP``, ``add(parser)``, ``check(options)`` and ``run(options)``. A
command module imports heavy packages inside ``check`` and ``run`` only.
"""
