"""Decide whether a job leaves it to the system which weights are in memory."""

from __future__ import annotations

from ..model.surroundings import free_memory
from .job import Job
from .source import Source


def streams(job: Job) -> bool:
    """Return True if a job puts the weights that it computes into mapped files, not into memory.

    Weights that are only read are mapped in any case, and the result is the same, byte for byte.
    """
    return is_large(job.source) if job.stream is None else job.stream


def is_large(source: Source) -> bool:
    """Return True if a folder's weights take more than half of the memory that is free."""
    folder = source.folder
    files = () if folder is None else folder.rglob("*.safetensors")
    return 2 * sum(file.stat().st_size for file in files) > free_memory()
