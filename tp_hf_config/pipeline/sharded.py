"""Write a model that FSDP2 keeps in shards into a folder, as one process would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..arguments import check_arguments
from ..errors import PipelineError
from ..graph.meta_copy import meta_copy_of
from ..graph.rebuild import empty_copy
from ..model.fill import fill
from ..model.locate import find_pretrained
from ..model.ranks import agree, are_several
from ..model.sharded import whole_tensor
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

    Every rank has to call it; rank 0 gathers the whole model in CPU memory and writes. The files
    are those that ``save_pretrained`` of the same model in one process writes, the config with the
    rotary fields that Transformers 4 reads. The folder appears whole or not at all.

    Args:
        model: the model, as ``hook.sharded_model``.
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

    copy: Any = find_pretrained(meta_copy_of(model))[1]
    target = Path(folder)
    writes = not are_several() or dist.get_rank() == 0
    with _together("the start of save_sharded"):
        if writes:
            check_target(target, overwrite=overwrite)

    def gathered(name: str, empty: Tensor) -> Tensor:
        values = whole_tensor(copy, name)  # all ranks gather it
        return values.cpu() if writes else empty

    whole_model = empty_copy(copy)
    fill(whole_model, copy, gathered)
    with _together("the end of save_sharded"):
        if writes:
            with new_folder(target, overwrite=overwrite) as work:
                save_model(whole_model, work, max_shard_size)
    return target


@contextmanager
def _together(when: str) -> Iterator[None]:
    """Raise at the end of ``with`` on all ranks if one has failed there."""
    failure: PipelineError | None = None
    try:
        yield
    except PipelineError as error:
        failure = error
    agree(PipelineError, when, failure=failure)
