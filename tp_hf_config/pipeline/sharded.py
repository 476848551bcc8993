"""Write a model that FSDP2 keeps in shards into a folder, as one process would."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..arguments import check_arguments
from ..errors import PipelineError, in_one_line
from ..graph.meta_copy import meta_copy_of
from ..graph.rebuild import empty_copy
from ..model.fill import fill
from ..model.locate import find_pretrained
from ..model.ranks import Decision, differing
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
    target, failure = Path(folder), ""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if writes:
            check_target(target, overwrite=overwrite)
    except PipelineError as error:
        failure = in_one_line(error)
    _agree("the start of save_sharded", failure)

    def gathered(name: str, empty: Tensor) -> Tensor:
        values = whole_tensor(copy, name)  # all ranks gather it
        return values.cpu() if writes else empty

    whole_model = empty_copy(copy)
    fill(whole_model, copy, gathered)
    try:
        if writes:
            with new_folder(target, overwrite=overwrite) as work:
                save_model(whole_model, work, max_shard_size)
    except PipelineError as error:
        failure = in_one_line(error)
    _agree("the end of save_sharded", failure)
    return target


def _agree(when: str, failure: str = "") -> None:
    refusal = differing(Decision(when, failure=failure))
    if refusal is not None:
        raise PipelineError(refusal.reason)
