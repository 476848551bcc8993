"""Transformers without its progress bars, and with as few log lines as are asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers(level: int = logging.ERROR) -> Iterator[None]:
    """No progress bars, and log lines from ``level`` on; as it was afterwards."""
    from transformers.utils import logging as untyped

    bars: Any = untyped
    logger = logging.getLogger("transformers")
    before, shown = logger.level, bars.is_progress_bar_enabled()
    try:
        logger.setLevel(level)
        bars.disable_progress_bar()
        yield
    finally:
        logger.setLevel(before)
        if shown:
            bars.enable_progress_bar()
