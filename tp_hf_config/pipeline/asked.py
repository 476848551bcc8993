"""Refuse what can be refused without torch and without a model: paths and arguments."""

from __future__ import annotations

from pathlib import Path

from ..errors import PipelineError
from .job import Job
from .output import check_target


def check_asked(job: Job) -> str | None:
    """Check everything about a job that needs no model, and read the calibration text.

    Returns:
        The calibration text; ``None`` if the job has none.

    Raises:
        PipelineError: ``job.importance`` or ``job.recover`` needs a text and there is none, the
            text cannot be read, or the output folder cannot be written to.
    """
    wanting = "--importance taylor" if job.importance == "taylor" else "--recover"
    if job.calibration is None and (job.importance == "taylor" or job.recover):
        raise PipelineError(
            f"{wanting} needs text to run the model on. Add --calibration FILE (plain text, some "
            "thousand words of what the model is for)"
            + (", or use --importance magnitude" if job.importance == "taylor" else "")
        )
    check_target(job.out, source=job.source.folder, overwrite=job.overwrite)
    return None if job.calibration is None else read_text(job.calibration)


def read_text(path: Path) -> str:
    """Return the calibration text in a file.

    Raises:
        PipelineError: the file cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(
            f"{path}: expected plain text in UTF-8, found other bytes at {error.start:,}"
        ) from error
    except OSError as error:
        raise PipelineError(f"{path}: calibration text cannot be read: {error.strerror}") from error
    if not text.strip():
        raise PipelineError(f"{path}: the calibration text is empty")
    return text
