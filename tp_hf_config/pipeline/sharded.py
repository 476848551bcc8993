"""Write a model that FSDP2 keeps in shards into a folder, as one process would."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.lazy_weights import read_as_written, written_one_by_one
from ..errors import PipelineError, in_one_line
from ..graph.standin import standin_of
from ..model.locate import find_pretrained
from ..model.ranks import Decision, differing
from .output import check_target, new_folder, save_model


def save_sharded(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Write a model under FSDP2 into a folder that ``from_pretrained`` loads.

    Every rank has to call it; rank 0 writes. One whole weight is in memory at a time, and the files
    are those that ``save_pretrained`` of the same model in one process writes. The folder appears
    whole or not at all.

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
        with new_folder(target, overwrite=overwrite) as work:
            save_model(standin, work, max_shard_size)
    else:
        _read_along(standin, max_shard_size)
    _agree("the end of save_sharded")
    return target


def _read_along(standin: Any, max_shard_size: str | None) -> None:
    """Gather what rank 0 writes, in its order, and write no weights."""
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    saves = {"should_save_on_this_rank": lambda is_main_process: True}  # Transformers: on rank 0
    vars(standin).update(saves)
    try:
        with tempfile.TemporaryDirectory() as work, written_one_by_one(read_as_written):
            standin.save_pretrained(work, **shards)
    finally:
        for name in saves:
            del vars(standin)[name]


def _agree(when: str, failure: str = "") -> None:
    refusal = differing(Decision(when, failure=failure))
    if refusal is not None:
        raise PipelineError(refusal.reason)
