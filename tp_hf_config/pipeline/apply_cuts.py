"""Carry a cut list out on a model, or from one folder to another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, overload

from torch import nn

from ..arguments import check_arguments
from ..errors import PipelineError, warn
from ..fieldmap.layer_map import by_layers
from ..fieldmap.learn_field_map import map_of
from ..graph.cut_list import CutList
from ..graph.rebuild import rebuilt
from ..model.locate import check_followable, find_pretrained
from ..model.paging import paged
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
    """Make the pruned model of an unpruned one by a cut list, or the pruned folder of a folder.

    ``hook.cuts`` holds what a pruner cut, ``hook.cuts.save(path)`` writes it.  The model that is
    passed stays as it is; the pruned one is returned, with the bits that pruning in place gives.
    From folder to folder the system pages, so a model that fits nowhere can be cut by a list that
    was made from its config, from another copy, or on another machine.

    Args:
        model_or_folder: an unpruned model; or a folder.
        cuts: a cut list, or the file that it was saved to.
        out: the folder to write, for a folder.
        overwrite: replace a model folder that is at ``out``.
        max_shard_size: the size of each weight file, as ``save_pretrained`` takes it.
        trust_remote_code: run the Python files that come with the folder's model.

    Returns:
        A new model, built from the new config; or the folder that was written, once a fresh
        process has read it and computes the same.

    Raises:
        CheckpointError: the cut list cannot be read.
        UnsupportedModelError: it was made for another class or config.
        ValueError: weights were refitted, and a cut list holds cuts alone.
        ConfigSyncError: the class does not build what it leaves.
        PipelineError: the folder cannot be read or written; nothing is at ``out``.
    """
    cuts = cuts if isinstance(cuts, CutList) else CutList.load(cuts)
    if isinstance(model_or_folder, nn.Module):
        model = find_pretrained(model_or_folder)[1]
        check_followable(model)
        return rebuilt(model, cuts)
    if out is None:
        raise PipelineError(f"apply_cuts({str(model_or_folder)!r}, cuts): say where to write, out=")
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
