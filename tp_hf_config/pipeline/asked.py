"""What can be refused before torch is imported: paths, and arguments that do not go together."""

from __future__ import annotations

from pathlib import Path

from ..errors import PipelineError
from .job import Job
from .output import check_target


def check_asked(job: Job) -> str | None:
    """The calibration text, once all that needs no model is in order.

    Raises:
        PipelineError: something is not.
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
    """The calibration text.

    Raises:
        PipelineError: there is none.
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
