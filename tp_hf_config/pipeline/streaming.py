"""Decide whether a job goes from folder to folder, with one tensor in memory at a time."""

from __future__ import annotations

from ..checkpoint.folder import read_weights, weights_file
from ..errors import CheckpointError, PipelineError
from ..model.surroundings import free_memory
from .choice import Choice
from .job import Job
from .source import Source

_WITHOUT_RUNNING = ("magnitude", "random")


def streams(job: Job, choice: Choice) -> bool:
    """Return True if weights are to be read when they are used, and not held in memory.

    By default they are where the model is not run for its importances (the result is the same, byte
    for byte), and where they would take more than half of the memory that is free.

    ``choice``: what it does with a model of this class.

    Raises:
        PipelineError: the user asked for it, and it cannot be.
    """
    reason = _why_not(job, choice)
    if job.stream and reason is not None:
        raise PipelineError(f"--stream: {reason}")
    if reason is not None or job.stream is False:
        return False
    without_running = choice.origin is None and choice.importance in _WITHOUT_RUNNING
    return bool(job.stream) or without_running or _is_large(job)


def _why_not(job: Job, choice: Choice) -> str | None:
    """Return why a job needs its weights in memory; ``None`` if it does not."""
    reason = why_not_read_lazily(job.source)
    if reason is not None:
        return reason
    if job.recover or choice.importance == "taylor":
        what = "--recover" if job.recover else "--importance taylor"
        return f"{what} trains the model, which takes its weights in memory. Leave it out"
    if job.calibration == "own":
        return "a model that writes its own text reads all its weights for each token: use a FILE"
    if job.device != "cpu":
        return "weights are read to the CPU: leave --device out"
    return None


def why_not_read_lazily(source: Source) -> str | None:
    """Return why a model's weights cannot be read one at a time; ``None`` if they can."""
    from ..checkpoint.loading import MAJOR

    if source.folder is None or source.gguf is not None:
        return "expected a folder with safetensors files"
    if MAJOR < 5:
        return "it takes Transformers 5"
    try:
        if ".safetensors" not in weights_file(source.folder):
            return "the weights are no safetensors files: load and save the model once"
    except CheckpointError as error:
        return str(error)
    return None


def _is_large(job: Job) -> bool:
    """Return True if a folder's weights take more than half of the memory that is free."""
    assert job.source.folder is not None  # _why_not looked
    size = sum(stored.bytes for stored in read_weights(job.source.folder).tensors.values())
    return 2 * size > free_memory()
