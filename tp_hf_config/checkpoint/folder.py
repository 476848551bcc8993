"""Read a folder's config and weights files as they are; nothing in them is trusted yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .headers import Header, Stored, read_pickle, read_safetensors
from .words import and_more, short

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
"""The file that says that PEFT adapters belong to a folder's weights."""
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ENTRIES = "per_layer_config"
_MOST_CONFIG_BYTES = 32 * 2**20
_MOST_INDEX_BYTES = 256 * 2**20
_LONGEST_NAME = 200
_MOST_FIELDS = 4096
_MOST_VALUES = 500_000
_DEEPEST = 64
_MOST_TENSORS = 500_000


@dataclass(frozen=True)
class Weights(Header):
    """The headers of all weights files of a folder, as one.

    Attributes:
        files: the names of the files with tensors.
    """

    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """What config.json says.

    Attributes:
        data: its JSON; ``None`` if it cannot be read.
        fault: why it cannot be loaded; ``None`` if it can.
        unsure: why the config cannot be judged; ``None`` if it can.
    """

    data: dict[str, Any] | None
    fault: str | None = None
    unsure: str | None = None


def check_exists(folder: Path) -> None:
    """Raise a CheckpointError if the folder or its config.json does not exist."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}. Say the folder that holds config.json.")
    if not (folder / CONFIG).exists():
        inside = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f" There is one in {folder / inside[0]}." if inside else ""
        raise CheckpointError(f"{folder} has no {CONFIG}.{hint} Say the folder that holds it.")


def check_model_folder(folder: Path) -> None:
    """Raise a CheckpointError if the path is no folder with a config and weights.

    The commands call this before torch is imported.

    Raises:
        CheckpointError: the folder, its config.json or its weights do not exist or cannot be read.
    """
    try:
        check_exists(folder)
        weights_file(folder)
    except (OSError, ValueError) as error:  # no permission; a name that no file can have
        raise CheckpointError(f"{short(folder)} cannot be read: {short(error)}") from error


def read_config(folder: Path) -> Config:
    """Return what the folder's config.json says."""
    data = _json(folder / CONFIG, _MOST_CONFIG_BYTES)
    if isinstance(data, str):
        return Config(None, fault=data)
    if not isinstance(data, dict):
        return Config(None, fault=f"{CONFIG} holds a {type(data).__name__}; expected an object")
    unsure = _too_much(data)
    return Config(data, fault=None if unsure else _wrong_entries(data), unsure=unsure)


def _wrong_entries(data: dict[str, Any]) -> str | None:
    """Return what is wrong with the form of entries for single layers, anywhere in a config."""
    for _, part in _values(data):
        entries = part.get(_ENTRIES) if isinstance(part, dict) else None
        if entries is None:
            continue
        numbered = isinstance(entries, dict) and all(number.isdecimal() for number in entries)
        if not numbered or not all(isinstance(entry, dict) for entry in entries.values()):
            return (
                f"{_ENTRIES} says {short(json.dumps(entries))}; expected layer -> its values: "
                f'"{_ENTRIES}": {{"3": {{"intermediate_size": 64}}}}'
            )
    return None


def _json(path: Path, longest: int) -> Any:
    """Return a file's JSON, or the reason (a string) why it cannot be read.

    ``longest``: the largest size in bytes that is read.
    """
    name = path.name
    if not path.is_file():
        return f"{name} is not a file" if path.exists() else f"{name} is missing"
    try:
        if path.stat().st_size > longest:
            return f"{name} has {path.stat().st_size:,} bytes; at most {longest:,} are read"
        data = json.loads(path.read_bytes().decode("utf-8"))  # as Transformers reads it
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    except RecursionError:
        return f"{name} is nested too deeply"
    except ValueError as error:
        return f"{name} is not JSON: {short(error)}"
    return f"{name} holds a text; expected an object" if isinstance(data, str) else data


def _too_much(data: dict[str, Any]) -> str | None:
    """Return why a config is not tried (too many fields or values, or too deep), or None."""
    if len(data) > _MOST_FIELDS:
        return f"{CONFIG} has {len(data):,} fields; at most {_MOST_FIELDS:,} are tried"
    for count, (depth, _) in enumerate(_values(data)):
        if depth > _DEEPEST or count > _MOST_VALUES:
            return f"{CONFIG} has more values, or nests them deeper, than any config that is tried"
    return None


def _values(data: Any) -> Iterator[tuple[int, Any]]:
    """Yield the depth of each value of a config's JSON, and the value; stop below ``_DEEPEST``."""
    waiting = [(0, data)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if depth <= _DEEPEST and isinstance(value, (dict, list)):
            inside = value.values() if isinstance(value, dict) else value
            waiting.extend((depth + 1, item) for item in inside)


def read_weights(folder: Path) -> Weights:
    """Read the headers of the weights files that ``from_pretrained`` would load.

    Raises:
        CheckpointError: there are no weights.
    """
    name = weights_file(folder)
    if not name.endswith(".index.json"):
        return _joined([_header(folder, name)], (name,))
    index = _shards(folder, name)
    if isinstance(index, str):
        return Weights({}, (index,), complete=False)
    shards, promised, faults = index
    weights = _joined([_header(folder, shard) for shard in shards], shards)
    return _with_index(weights, promised, faults)


def weights_file(folder: Path) -> str:
    """Return the name of the file that ``from_pretrained`` would read first.

    It is the one that config.json names (``transformers_weights``), where it names one.

    Raises:
        CheckpointError: there is none.
    """
    named = (read_config(folder).data or {}).get("transformers_weights")
    if named is not None:
        if not _is_weights_file(folder, named):
            raise CheckpointError(
                f"{folder}: config.json says that its weights are in {short(named)} "
                "(transformers_weights); expected a safetensors file, or an index of such files, "
                "in the folder."
            )
        return str(named)
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(_no_weights(folder))
    return name


def _no_weights(folder: Path) -> str:
    """Return the message for a folder without weights."""
    not_files = [name for name in _WEIGHTS if (folder / name).exists()]
    if not_files:
        return f"{folder / not_files[0]} is not a file; expected the weights."
    others = sorted(
        p.name for end in ("safetensors", "bin", "gguf") for p in folder.glob(f"*.{end}")
    )
    hint = f" There is {others[0]}{and_more(others)}, which no plain load reads." if others else ""
    return f"{folder} has no weights ({', '.join(_WEIGHTS)}).{hint}"


def _is_weights_file(folder: Path, name: Any) -> bool:
    """True if config.json may give a weights file this name, and the file is there."""
    if not isinstance(name, str) or not _inside(name.removesuffix(".index.json")):
        return False
    return name.endswith((".safetensors", ".safetensors.index.json")) and (folder / name).is_file()


def _header(folder: Path, name: str) -> Header:
    """Return the header of a weights file; its tensors say in which file of the folder they are."""
    path = folder / name
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        return Header({}, (f"{name} {what}; the index names it",), complete=False)
    header = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    tensors = {key: replace(stored, file=name) for key, stored in header.tensors.items()}
    return replace(header, tensors=tensors)


def _joined(headers: list[Header], files: tuple[str, ...]) -> Weights:
    """Return the headers of several files as one."""
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    unsure = next((header.unsure for header in headers if header.unsure is not None), None)
    if len(tensors) > _MOST_TENSORS:
        unsure = f"the files have {len(tensors):,} tensors; at most {_MOST_TENSORS:,} are looked at"
    faults = tuple(fault for header in headers for fault in header.faults)
    return Weights(tensors, faults, all(header.complete for header in headers), unsure, files)


def _shards(
    folder: Path, index: str
) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]] | str:
    """Read an index: its shards, and what is wrong with it.

    Returns:
        The shards inside the folder, tensor name -> file as the index says, and the faults; or the
        reason (a string) why the index cannot be used.
    """
    data = _json(folder / index, _MOST_INDEX_BYTES)
    if isinstance(data, str):
        return data
    promised = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(promised, dict) or not promised:
        return f"{index} has no weight_map that says which tensor is in which file"
    if not all(isinstance(file, str) and file for file in promised.values()):
        return f"{index}: its weight_map should give a file's name for every tensor"
    if not isinstance(data.get("metadata"), dict):
        return f'{index} has no metadata, which Transformers reads. Add "metadata": {{}} to it'
    files = sorted(set(promised.values()))
    outside = [file for file in files if not _inside(file)]
    faults: tuple[str, ...] = ()
    if outside:
        faults = (
            f"{index} names {short(outside[0])}{and_more(outside)}, outside the folder: not read",
        )
    return tuple(file for file in files if _inside(file)), promised, faults


def _inside(file: str) -> bool:
    """True if a weights file's name, taken literally, stays in the folder; links may lead out."""
    path = Path(file)
    plain = file.isprintable() and len(file) < _LONGEST_NAME and "\\" not in file
    plain = plain and not path.is_absolute() and ".." not in path.parts
    return plain and path.suffix in (".safetensors", ".bin")


def _with_index(weights: Weights, promised: dict[str, str], faults: tuple[str, ...]) -> Weights:
    """Add to the weights the faults of their index, and where it names the wrong file for a tensor.

    Args:
        weights: what the shards hold.
        promised: tensor name -> file, as the index says.
        faults: what is wrong with the index.
    """
    complete = weights.complete and not faults
    faults += weights.faults
    elsewhere = [
        name
        for name, file in promised.items()
        if complete and weights.tensors.get(name, Stored("", ())).file != file
    ]
    if elsewhere:
        faults += (
            f"the index says that {short(elsewhere[0])} is in {short(promised[elsewhere[0]])}"
            f"{and_more(elsewhere)}; it is not",
        )
    return replace(weights, faults=faults, complete=complete)
