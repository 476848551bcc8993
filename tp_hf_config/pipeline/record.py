"""Record what a result depends on, so that a later run can tell whether its own is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint.folder import CONFIG, read_weights
from ..checkpoint.headers import header_bytes
from ..schema import versions
from .companions import companion_files
from .job import Job
from .source import Source

_ELSEWHERE = ("source", "out", "calibration", "overwrite", "stream", "resume", "command")
"""What of a job the result does not depend on, or what is recorded in another way."""


def record_of_job(job: Job, text: str | None) -> dict[str, Any]:
    """Return what the result of a job depends on that goes from folder to folder.

    ``text``: what is in its calibration file; ``None`` if it has none.
    """
    settings = {
        part.name: _plain(getattr(job, part.name))
        for part in fields(job)
        if part.name not in _ELSEWHERE
    }
    if isinstance(job.calibration, Path):
        settings["calibration"] = job.calibration.name
        settings["calibration text"] = _digest((text or "").encode())
    return record(job.source, settings)


def record(source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on: settings, the files of its source, and versions.

    Args:
        source: a folder with safetensors files.
        settings: the settings, for ``json.dumps``.

    Raises:
        CheckpointError: the folder has no weights.
    """
    return {
        "settings": dict(settings),
        "source": {
            "name": source.name,
            "trust_remote_code": source.trust_remote_code,
            "files": dict(_files(source)),
        },
        "versions": versions(),
    }


def _files(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield every file that a model is read from, and what tells it from another."""
    folder = Path(source.place)
    others = companion_files(source)
    for name in (CONFIG, "generation_config.json", "README.md", *others):
        if (folder / name).is_file():
            yield name, _digest((folder / name).read_bytes())
    for name in read_weights(folder).files:
        state = (folder / name).stat()
        yield name, [state.st_size, state.st_mtime_ns, _digest(header_bytes(folder / name))]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return a setting for ``json.dumps``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
