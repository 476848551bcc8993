"""Write a folder from an unpruned one and a cut list, or from a model that FSDP2 shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from ..arguments import check_arguments
from ..errors import CheckpointError, PipelineError, warn
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.model_view import by_layers
from ..graph.cut_list import CutList
from ..graph.rebuild import empty_copy, meta_copy_of, rebuilt
from ..model.fill import fill
from ..model.locate import check_followable, find_pretrained
from ..model.paging import in_file, paged
from ..model.sharded import agree, are_several, whole_tensor
from .companions import copy_companions
from .output import check_savable, check_target, output_folder, save_model
from .proofs import prove_roundtrip
from .source import check_source, class_for, config_of, find_source, is_large, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@overload
def apply_cuts(
    model_or_folder: nn.Module, cuts: CutList | str | os.PathLike[str]
) -> PreTrainedModel: ...


@overload
def apply_cuts(
    model_or_folder: str | os.PathLike[str],
    cuts: CutList | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> Path: ...


@check_arguments
def apply_cuts(
    model_or_folder: nn.Module | str | os.PathLike[str],
    cuts: CutList | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | Path:
    """Make the pruned model, or the pruned folder, from an unpruned one and a cut list.

    ``hook.cuts`` is the cut list of a pruner, and ``hook.cuts.save(path)`` writes it. The model
    that is passed is not changed; the returned one has the same bits as after pruning in place. A
    folder is read and written through mapped files, so a model larger than memory can be cut by a
    list made from its config, from another copy, or on another machine.

    Args:
        model_or_folder: an unpruned model; or a folder.
        cuts: a cut list, or the file that it was saved to.
        out: the folder to write, if ``model_or_folder`` is a folder.
        overwrite: replace a model folder at ``out``.
        max_shard_size: the size of each weight file, as in ``save_pretrained``.
        trust_remote_code: run the Python files that come with the folder's model.

    Returns:
        A new model, built from the new config; or the written folder, after a fresh process has
        loaded it and computed the same outputs.

    Raises:
        CheckpointError: the cut list cannot be read.
        UnsupportedModelError: it was made for another class or config.
        ValueError: weights were refitted, which a cut list does not contain.
        ConfigSyncError: the class does not build the pruned model.
        PipelineError: the folder cannot be read or written; nothing is at ``out``.
    """
    cuts = cuts if isinstance(cuts, CutList) else CutList.load(cuts)
    if isinstance(model_or_folder, nn.Module):
        if out is not None:
            raise PipelineError(
                "apply_cuts(model, cuts) returns the pruned model and writes nothing. Remove out=, "
                "and save the returned model with save_pretrained()"
            )
        model = find_pretrained(model_or_folder)[1]
        check_followable(model)
        return rebuilt(model, cuts)
    if out is None:
        raise PipelineError(
            f"apply_cuts({str(model_or_folder)!r}, cuts) writes a folder: pass its path as out="
        )
    source = find_source(os.fspath(model_or_folder), trust_remote_code)
    target = Path(out)
    check_target(target, source=source.folder, overwrite=overwrite)
    config = config_of(source)
    check_source(source, config)
    with (
        output_folder(target, source=source.folder, overwrite=overwrite) as work,
        paged(work if is_large(source) else None),
    ):
        whole, notes = load(source, config, class_for(source, config), complete=True)
        for note in notes:
            warn(note, UserWarning)
        check_savable(whole)
        recipe = map_of(whole, how=by_layers).recipe
        model = rebuilt(whole, cuts)
        save_model(model, work, max_shard_size)
        copy_companions(source, work)
        prove_roundtrip(model, work, recipe)
    return target


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
