"""The shell command ``tp-hf-config``: arguments, output and exit codes, no other logic."""
