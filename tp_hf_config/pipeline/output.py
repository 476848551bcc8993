"""Write a folder completely or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.folder import CONFIG, hidden_beside, new_folder, write_config
from ..errors import PipelineError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_A_MODEL = ("config.json", "model.gguf")  # a folder with one of these files holds a model


@contextmanager
def output_folder(target: Path, *, source: Path | None = None, overwrite: bool) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` at the end, and is removed after a failure."""
    check = partial(check_target, target, source=source, overwrite=overwrite)
    try:
        with new_folder(target.expanduser().resolve(), check) as work:
            yield work
    except OSError as error:
        raise PipelineError(f"{target}: cannot be written: {error}") from error


def check_target(target: Path, *, source: Path | None = None, overwrite: bool) -> None:
    """Raise now if :func:`output_folder` would refuse ``target``, before anything is computed."""
    try:
        path = target.expanduser().resolve()
        reason = _why_unwritable(path, source, overwrite)
        if reason is None:
            hidden_beside(path).exists()  # raises if this longer name is too long
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no home folder, bad name
        raise PipelineError(f"{target}: cannot be written: {error}") from error
    if reason is not None:
        raise PipelineError(reason)


def _why_unwritable(target: Path, source: Path | None, overwrite: bool) -> str | None:
    if not target.parent.is_dir():
        return f"{target}: its parent folder does not exist. Create it first: {target.parent}"
    if target.exists() and not target.is_dir():
        return f"{target}: expected a new folder, found a file. Choose another name."
    if target.is_mount():
        return (
            f"{target}: another disk is mounted here, so the finished folder cannot be renamed to "
            f"this path. Choose a folder inside: {target / 'pruned'}"
        )
    filled = target.exists() and any(target.iterdir())
    if filled and not overwrite:
        return (
            f"{target}: is not empty. Choose another folder, or add overwrite=True to replace it."
        )
    if filled and not any((target / name).is_file() for name in _OF_A_MODEL):
        return (
            f"{target}: is not empty and contains no {' or '.join(_OF_A_MODEL)}; "
            "overwrite=True replaces only models."
        )
    if source is not None and source.resolve().is_relative_to(target):
        return f"{target}: contains the model to be read. Choose another folder."
    return None


def check_savable(model: PreTrainedModel) -> None:
    """Raise before pruning if the generation config cannot be saved.

    Transformers up to 5.0 refuses fields that contradict each other, which published models have.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            generation.save_pretrained(folder)
        except ValueError as error:
            raise PipelineError(
                f"{type(model).__name__}: the installed Transformers cannot save its generation "
                f"config. Correct generation_config.json: {in_one_line(error)}"
            ) from error


def save_model(
    model: PreTrainedModel, folder: Path, max_shard_size: str | None = None
) -> tuple[str, ...]:
    """Write a model's weights and its config, with the rotary fields that Transformers 4 reads.

    Return what the config cannot express for Transformers 4, one sentence each.
    """
    # imports torch, which the checks of a job do not need
    from ..checkpoint.building import Classes
    from ..checkpoint.loading import main_dtype, write_for_transformers_4
    from ..model.paging import conversions_in_files

    shards: Any = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with writing_weights(), conversions_in_files():
        model.save_pretrained(folder, **shards)
    _correct_dtype(folder, str(main_dtype(model)).removeprefix("torch."))
    return write_for_transformers_4(folder, Classes(type(model.config), type(model), 0))


def _correct_dtype(folder: Path, dtype: str) -> None:
    data = json.loads((folder / CONFIG).read_bytes())
    name = "torch_dtype" if "torch_dtype" in data else "dtype"  # Transformers 4 and 5
    if data.get(name, dtype) != dtype:
        data[name] = dtype
        write_config(folder, data)


@contextmanager
def writing_weights() -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise PipelineError(f"the weights cannot be written: {error}") from error  # a full disk
