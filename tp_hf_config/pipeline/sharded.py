"""Write a model that FSDP2 keeps in shards into a folder, as one process would."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import modeling_utils

from ..arguments import check_arguments
from ..errors import PipelineError, in_one_line
from ..graph.standin import standin_of
from ..model.lazy_tensor import values_of
from ..model.locate import find_pretrained
from ..model.ranks import Decision, differing
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

    Every rank has to call it; rank 0 writes. One file's weights are in memory at a time. The files
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
    write = _Writer()
    try:
        with output_folder(target, overwrite=overwrite) as work:
            with patch.object(modeling_utils, "safe_save_file", write):
                save_model(standin, work, max_shard_size)
            if write.failure is not None:
                raise PipelineError(f"{target}: cannot be written: {write.failure}")
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
        replaced.enter_context(patch.object(modeling_utils, "safe_save_file", _gather))
        standin.save_pretrained(work, **shards)


class _Writer:
    """Writes safetensors files whose tensors are gathered; once one cannot be written, it gathers.

    So other ranks, which gather too, are not left waiting.

    Attributes:
        failure: why a file could not be written; ``None`` if none failed.
        began: a file was begun.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.began = False

    def __call__(self, tensors: Any, path: Any, metadata: Any = None) -> None:
        """Write a file, as ``safetensors.torch.save_file`` does."""
        self.began = True
        whole = {name: values_of(tensors[name]).contiguous() for name in sorted(tensors)}
        if self.failure is None:
            try:
                save_file(whole, path, metadata)
            except (OSError, SafetensorError) as error:
                self.failure = error


def _gather(tensors: Any, path: Any, metadata: Any = None) -> None:
    """Gather what :class:`_Writer` gathers, in its order, and write nothing."""
    for name in sorted(tensors):
        values_of(tensors[name])


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
