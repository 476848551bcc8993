"""Decide whether a job can go from folder to folder, with one tensor in memory at a time."""

from __future__ import annotations

from ..checkpoint.folder import weights_file
from ..errors import CheckpointError
from .choice import Choice
from .job import Job

_WITHOUT_RUNNING = ("magnitude", "random")


def streams(job: Job, choice: Choice) -> bool:
    """True if the weights can be read when they are used, and need not be in memory.

    The model is not run for its importances, on the CPU, and comes as safetensors in a folder.

    Args:
        job: the job.
        choice: what it does with a model of this class.
    """
    from ..checkpoint.loading import MAJOR

    plain = choice.origin is None and choice.importance in _WITHOUT_RUNNING
    folder = job.source.folder
    if not plain or job.device != "cpu" or folder is None or job.source.gguf or MAJOR < 5:
        return False
    try:
        return ".safetensors" in weights_file(folder)
    except CheckpointError:
        return False  # loading it says why
