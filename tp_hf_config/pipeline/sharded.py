"""Write a model that FSDP2 keeps in shards into a folder, as one process would."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_arguments
from ..checkpoint.lazy_weights import WritesOrReads, read_as_written, written_one_by_one
from ..errors import PipelineError, in_one_line
from ..graph.standin import standin_of
from ..model.locate import find_pretrained
from ..model.ranks import Decision, differing
from .output import check_target, new_folder, save_model


@check_arguments
def save_sharded(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Write a model under FSDP2 into a folder that ``from_pretrained`` loads.

    Every rank has to call it; rank 0 writes. One whole weight is in memory at a time, and the files
    are those that ``save_pretrained`` of the same model in one process writes, the config with the
    rotary fields that Transformers 4 reads. The folder appears whole or not at all.

    Args:
        model: the model, as ``hook.rebuilt_model``.
        folder: the folder to write.
        overwrite: replace a model folder that is there.
        max_shard_size: the size of each weight file, as ``save_pretrained`` takes it.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: something else than FSDP2 shards the model.
        PipelineError: the folder cannot be written, or a rank does not come.
    """
    import torch.distributed as dist

    standin: Any = find_pretrained(standin_of(model))[1]
    target, failure = Path(folder), ""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if writes:
            check_target(target, overwrite=overwrite)
    except PipelineError as error:
        failure = in_one_line(error)
    _agree("the start of save_sharded", failure)
    if writes:
        failure = _write(standin, target, overwrite, max_shard_size)
    else:
        _read_along(standin, max_shard_size)
    _agree("the end of save_sharded", failure)
    return target


def _write(standin: Any, target: Path, overwrite: bool, max_shard_size: str | None) -> str:
    """Write the folder; return why it could not be, once all weights were gathered, or ``""``."""
    write = WritesOrReads()
    try:
        with new_folder(target, overwrite=overwrite) as work:
            save_model(standin, work, max_shard_size, write)
            if write.failure is not None:
                raise write.failure
    except PipelineError as error:
        if not write.began:
            with suppress(OSError):  # the index, on the same disk
                _read_along(standin, max_shard_size)
        return in_one_line(error)
    return ""


def _read_along(standin: Any, max_shard_size: str | None) -> None:
    """Gather what rank 0 writes, in its order, and write neither weights nor configs."""
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    saves = {"should_save_on_this_rank": lambda is_main_process: True}  # Transformers: on rank 0
    with ExitStack() as replaced:
        replaced.enter_context(_with_attributes(standin, saves))
        for config in (standin.config, getattr(standin, "generation_config", None)):
            if config is not None:
                unsaved = {"save_pretrained": lambda *_, **__: None}
                replaced.enter_context(_with_attributes(config, unsaved))
        work = replaced.enter_context(tempfile.TemporaryDirectory())
        replaced.enter_context(written_one_by_one(read_as_written))
        standin.save_pretrained(work, **shards)


@contextmanager
def _with_attributes(held: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Give an object these attributes, instead of those of its class, for the block."""
    vars(held).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(held)[name]


def _agree(when: str, failure: str = "") -> None:
    refusal = differing(Decision(when, failure=failure))
    if refusal is not None:
        raise PipelineError(refusal.reason)
