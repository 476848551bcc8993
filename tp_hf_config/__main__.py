"""Run the shell command with ``python -m tp_hf_config``."""

from __future__ import annotations

import sys

from .cli.main import run

if __name__ == "__main__":
    sys.exit(run())
