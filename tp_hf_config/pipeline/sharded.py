"""Write a model that FSDP2 shards into a folder, as one process would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..arguments import check_arguments
from ..errors import CheckpointError, PipelineError
from ..graph.meta_copy import meta_copy_of
from ..graph.rebuild import empty_copy
from ..model.fill import fill
from ..model.locate import find_pretrained
from ..model.paging import in_file, paged
from ..model.ranks import agree, are_several
from ..model.sharded import whole_tensor
from .output import check_target, output_folder, save_model


@check_arguments
def save_sharded(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Write a model under FSDP2 into a folder that ``from_pretrained`` loads.

    Every rank has to call it; rank 0 writes. It gathers the weights into mapped files beside the
    folder, so only one weight is in memory at a time. The files are those that ``save_pretrained``
    writes in one process, and the config also has the rotary fields that Transformers 4 reads. The
    folder appears complete or not at all.

    Args:
        model: the model, as ``hook.sharded_model``.
        folder: the folder to write.
        overwrite: replace a model folder that is there.
        max_shard_size: the size of each weight file, as in ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: something other than FSDP2 shards the model.
        PipelineError: the folder cannot be written, or a rank does not call this.
    """
    import torch.distributed as dist

    copy: Any = find_pretrained(meta_copy_of(model))[1]
    target = Path(folder)
    writes = not are_several() or dist.get_rank() == 0
    with _together("the start of save_sharded"):
        if writes:
            check_target(target, overwrite=overwrite)

    failures: list[CheckpointError] = []

    def gathered(name: str, empty: Tensor) -> Tensor:
        values = whole_tensor(copy, name)  # all ranks gather all of them, even after a failure
        if not writes or failures:
            return empty
        try:
            return in_file(values.cpu())
        except CheckpointError as error:
            failures.append(error)
            return empty

    whole_model = empty_copy(copy)
    around = next(folder for folder in target.absolute().parents if folder.is_dir())
    with paged(around if writes else None):
        fill(whole_model, copy, gathered)
        with _together("the end of save_sharded"):
            if failures:
                raise PipelineError(f"{target}: cannot be written: {failures[0]}")
            if writes:
                with output_folder(target, overwrite=overwrite) as work:
                    save_model(whole_model, work, max_shard_size)
    return target


@contextmanager
def _together(when: str) -> Iterator[None]:
    """Raise on all ranks if one failed inside the block."""
    failure: PipelineError | None = None
    try:
        yield
    except PipelineError as error:
        failure = error
    agree(PipelineError, when, failure=failure)
