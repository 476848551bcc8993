"""Folders changed at random, and what has to hold of each: for the tests and ``make fuzz``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import folders
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tp_hf_config import CheckpointError, check_checkpoint, repair_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = ("llama", "llama-tied", "bert", "gpt2", "mixtral", "t5", "vit", "qwen3")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 140),
    st.sampled_from([2**31, 10**12, 10**30, 5000]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 4), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 4), max_size=2),
)


# Changes


def a_folder(data: st.DataObject, place: Path) -> Path:
    """What some class wrote."""
    return folders.saved(data.draw(st.sampled_from(NAMES)), place)


def with_another_config(data: st.DataObject, place: Path) -> Path:
    """Some fields have values of any kind."""
    folder = a_folder(data, place)
    names = st.sampled_from(sorted(folders.config_of(folder)))
    fields = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    return folders.edit(folder, **fields)


def with_other_bytes(data: st.DataObject, place: Path) -> Path:
    """A file differs in a few bytes, or is cut off."""
    folder = a_folder(data, place)
    _change_bytes(data, folder / data.draw(st.sampled_from(["config.json", WEIGHTS])))
    return folder


def _change_bytes(data: st.DataObject, path: Path) -> None:
    content = bytearray(path.read_bytes())
    head = min(len(content), 4000)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path.write_bytes(bytes(content[:cut]))


def with_another_header(data: st.DataObject, place: Path) -> Path:
    """What the header says of some tensors is something else."""
    folder = a_folder(data, place)
    header = folders.header_of(folder / WEIGHTS)
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone"]))
        entry = header.pop(name, {})
        if key == "name":
            header[data.draw(st.sampled_from([name + "x", "model." + name, "5", ".", ""]))] = entry
        elif key != "gone":
            header[name] = {**entry, key: data.draw(VALUES)}
    folders.with_header(folder / WEIGHTS, header)
    return folder


def with_other_tensors(data: st.DataObject, place: Path) -> Path:
    """Some tensors have another shape, name or type, or are gone; the file is a sound one."""
    folder = a_folder(data, place)
    tensors = load_file(folder / WEIGHTS)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=4)):
        tensor = tensors.pop(name, torch.zeros(3))
        kind = data.draw(st.sampled_from(["shape", "name", "gone", "type"]))
        if kind == "shape":
            size = data.draw(st.integers(0, 3))
            tensors[name] = torch.zeros(*tensor.shape[:-1], size) if size else tensor[..., :0]
        elif kind == "name":
            name = name.replace(data.draw(st.sampled_from("01.wm")), data.draw(st.text(max_size=2)))
            tensors[name] = tensor
        elif kind == "type":
            tensors[name] = tensor.to(data.draw(st.sampled_from([torch.int8, torch.bfloat16])))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    return folder


def with_another_index(data: st.DataObject, place: Path) -> Path:
    """Shards whose index names other files for some tensors, or differs in a few bytes."""
    folder = folders.saved("llama", place, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    promised = index["weight_map"]
    files = st.one_of(st.sampled_from([*shards, "gone.safetensors", "config.json"]), VALUES)
    for name in data.draw(st.lists(st.sampled_from(sorted(promised)), max_size=3)):
        other = data.draw(st.sampled_from([name, name + "x", "model." + name, ""]))
        promised.pop(name, None)
        if data.draw(st.booleans()):
            promised[other] = data.draw(files)
    (folder / INDEX).write_text(json.dumps(index))
    kind = data.draw(st.sampled_from(["bytes", "gone", "swapped", "as it is"]))
    if kind == "bytes":
        _change_bytes(data, folder / data.draw(st.sampled_from([INDEX, *shards])))
    elif kind == "gone":
        (folder / data.draw(st.sampled_from([INDEX, *shards]))).unlink()
    elif kind == "swapped":
        (folder / shards[0]).write_bytes((folder / shards[-1]).read_bytes())
    return folder


# What has to hold


def judged(folder: Path) -> None:
    """Nothing but a verdict or a CheckpointError; the right one; nothing changed."""
    before = folders.files(folder)
    try:
        report = check_checkpoint(folder)
    except CheckpointError:
        return
    finally:
        assert folders.files(folder) == before
    str(report)
    json.dumps(report.to_dict())
    assert (report.sound is False) == bool(report.causes)
    assert (report.sound is None) == (report.why_not is not None)
    # Transformers 5 loads all that the shards hold, 4 what the index says: it has to be true
    lies = any("the index says that" in cause.text for cause in report.causes)
    if report.sound is not None and not lies:  # as Transformers finds it, in both directions
        assert folders.loads(folder) or not report.sound
        assert report.sound or not folders.loads(folder, exactly=True)


def repaired(folder: Path) -> None:
    """A folder that loads, or a CheckpointError and nothing changed."""
    before = folders.files(folder)
    try:
        report = repair_checkpoint(folder)
    except CheckpointError:
        assert folders.files(folder) == before
        return
    assert check_checkpoint(folder).sound is True
    assert folders.loads(folder)
    assert report.written == (folders.files(folder) != before)


class Kind(NamedTuple):
    """One kind of folders: how it is made in a place, and what is asked of it."""

    change: Callable[[st.DataObject, Path], Path]
    judge: Callable[[Path], Any]


KINDS = {
    "config": Kind(with_another_config, judged),
    "config-repaired": Kind(with_another_config, repaired),
    "bytes": Kind(with_other_bytes, judged),
    "header": Kind(with_another_header, judged),
    "tensors": Kind(with_other_tensors, judged),
    "tensors-repaired": Kind(with_other_tensors, repaired),
    "index": Kind(with_another_index, judged),
}
