"""Read a folder's config.json and the headers of its weights, trusting neither; write folders."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..model.files import flush
from .reports import and_more, short

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # marks PEFT adapters for the weights
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MOST_CONFIG_BYTES = 32 * 2**20
_MOST_INDEX_BYTES = 256 * 2**20
_LONGEST_NAME = 200
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    dtype: str  # as in the file (BF16)
    shape: tuple[int, ...]
    file: str = ""


@dataclass(frozen=True)
class Weights:
    """What the headers of a folder's weights files say."""

    tensors: dict[str, Stored]
    faults: tuple[str, ...] = ()  # of the files, one sentence each
    complete: bool = True  # all tensor names are known, whatever is wrong with their data
    unsure: str | None = None  # why the files cannot be judged
    files: tuple[str, ...] = ()  # that hold tensors


@dataclass(frozen=True)
class Config:
    """What config.json says."""

    data: dict[str, Any] | None  # its JSON; None if it cannot be read
    fault: str | None = None  # why it cannot be read


def check_exists(folder: Path) -> None:
    """Raise CheckpointError if the folder or its config.json does not exist."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}. Give the folder that contains config.json.")
    if not (folder / CONFIG).exists():
        inside = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f" There is one in {folder / inside[0]}." if inside else ""
        raise CheckpointError(f"{folder} has no {CONFIG}.{hint} Give the folder that contains it.")


def check_model_folder(folder: Path) -> None:
    """Raise CheckpointError for a bad model folder; called before torch is imported."""
    try:
        check_exists(folder)
        weights_file(folder)
    except (OSError, ValueError) as error:  # no permission; an impossible file name
        raise CheckpointError(f"{short(folder)} cannot be read: {short(error)}") from error


def read_config(folder: Path) -> Config:
    data = _json(folder / CONFIG, _MOST_CONFIG_BYTES)
    return Config(None, fault=data) if isinstance(data, str) else Config(data)


def _json(path: Path, longest: int) -> dict[str, Any] | str:
    """Return the object in a JSON file of at most ``longest`` bytes, or the reason why not."""
    name = path.name
    if not path.is_file():
        return f"{name} is not a file" if path.exists() else f"{name} is missing"
    try:
        if path.stat().st_size > longest:
            return f"{name} has {path.stat().st_size:,} bytes; at most {longest:,} are read"
        data = json.loads(path.read_bytes().decode("utf-8"))  # as Transformers decodes it
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    except RecursionError:
        return f"{name} is nested too deeply"
    except ValueError as error:
        return f"{name} is not JSON: {short(error)}"
    if not isinstance(data, dict):
        return f"{name} holds a {type(data).__name__}; expected an object"
    return data


def weights_file(folder: Path) -> str:
    """The file that ``from_pretrained`` reads first: config.json may name it."""
    named = (read_config(folder).data or {}).get("transformers_weights")
    if named is not None:
        if not _is_weights_file(folder, named):
            raise CheckpointError(
                f"{folder}: config.json says that its weights are in {short(named)} "
                "(transformers_weights); expected a safetensors file, or an index of safetensors "
                "files, in the folder."
            )
        return str(named)
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is not None:
        return name
    for name in _WEIGHTS:
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name} is not a file; expected the weights.")
    others = sorted(
        p.name for end in ("safetensors", "bin", "gguf") for p in folder.glob(f"*.{end}")
    )
    hint = (
        f" There is {others[0]}{and_more(others)}, which from_pretrained does not read by default."
        if others
        else ""
    )
    raise CheckpointError(f"{folder} has no weights ({', '.join(_WEIGHTS)}).{hint}")


def _is_weights_file(folder: Path, name: Any) -> bool:
    if not isinstance(name, str) or not _is_inside(name.removesuffix(".index.json")):
        return False
    return name.endswith((".safetensors", ".safetensors.index.json")) and (folder / name).is_file()


def _is_inside(file: str) -> bool:
    """True if a weights file's name does not leave the folder; links are allowed to."""
    path = Path(file)
    plain = file.isprintable() and len(file) < _LONGEST_NAME and "\\" not in file
    plain = plain and not path.is_absolute() and ".." not in path.parts
    return plain and path.suffix in (".safetensors", ".bin")


def read_weights(folder: Path) -> Weights:
    """Read the headers of the weights files that ``from_pretrained`` would load."""
    name = weights_file(folder)
    if not name.endswith(".index.json"):
        return _joined(folder, [name])
    index = _json(folder / name, _MOST_INDEX_BYTES)
    if isinstance(index, str):
        return _unreadable(index)
    fault = _index_fault(name, index)
    if fault is not None:
        return _unreadable(fault)
    promised = index["weight_map"]
    files = sorted(set(promised.values()))
    outside = [file for file in files if not _is_inside(file)]
    weights = _joined(folder, [file for file in files if _is_inside(file)])
    if outside:
        listed = f"{short(outside[0])}{and_more(outside)}"
        fault = f"{name} names {listed}, which is outside the folder and was not read"
        return replace(weights, faults=(fault, *weights.faults), complete=False)
    nothing = Stored("", ())
    elsewhere = [
        name for name, file in promised.items() if weights.tensors.get(name, nothing).file != file
    ]
    if weights.complete and elsewhere:
        fault = (
            f"the index says that {short(elsewhere[0])} is in {short(promised[elsewhere[0]])}"
            f"{and_more(elsewhere)}, but it is not there"
        )
        return replace(weights, faults=(*weights.faults, fault))
    return weights


def _index_fault(name: str, index: dict[str, Any]) -> str | None:
    promised = index.get("weight_map")
    if not isinstance(promised, dict) or not promised:
        return f"{name} has no weight_map that says which tensor is in which file"
    if not all(isinstance(file, str) and file for file in promised.values()):
        return f"{name}: its weight_map should give a file's name for every tensor"
    if not isinstance(index.get("metadata"), dict):
        return f'{name} has no metadata, which Transformers reads. Add "metadata": {{}} to it'
    return None


def _joined(folder: Path, files: list[str]) -> Weights:
    parts = [_read(folder / file, file) for file in files]
    return Weights(
        {name: tensor for part in parts for name, tensor in part.tensors.items()},
        tuple(fault for part in parts for fault in part.faults),
        all(part.complete for part in parts),
        next((part.unsure for part in parts if part.unsure is not None), None),
        tuple(files),
    )


def _unreadable(fault: str) -> Weights:
    return Weights({}, (fault,), complete=False)


def _read(path: Path, name: str) -> Weights:
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        return _unreadable(f"{name} {what}; the index names it")
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        return _unreadable(f"{name} cannot be read: {error.strerror or error}")
    if start == _POINTER:
        return _unreadable(
            f"{name} is a Git LFS pointer, not the weights. Download the weights: git lfs pull"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, name)
    why = f"{name} is a pickle, which has no header with shapes. Save the weights as safetensors"
    return Weights({}, complete=False, unsure=why)


def _read_safetensors(path: Path, name: str) -> Weights:
    try:
        with safe_open(path, framework="np") as file:  # "pt" would map the whole file for writing
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return Weights(
                {key: Stored(p.get_dtype(), tuple(p.get_shape()), name) for key, p in parts.items()}
            )
    except SafetensorError as error:
        return _unreadable(f"{name}: safetensors refuses it: {short(error)}")
    except MemoryError as error:
        return Weights(
            {}, complete=False, unsure=f"{name} cannot be mapped into memory: {short(error)}"
        )
    except OSError as error:
        return _unreadable(f"{name} cannot be read: {error.strerror or error}")


def write_config(folder: Path, data: dict[str, Any]) -> None:
    """Write a config's JSON into an unfinished folder, as Transformers formats it."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """Yield a hidden folder beside ``target``, renamed to it at the end, or removed on errors.

    An existing ``target`` is replaced. ``check`` raises if it may not be written; it is called
    again at the end, because another process may have written to ``target``.
    """
    check()
    work = hidden_beside(target)
    try:
        work.mkdir(parents=True)
        yield work
        for path in [*work.rglob("*"), work]:  # to the disk, before the folder gets its final name
            # some file systems cannot flush a folder
            with suppress(OSError) if path.is_dir() else nullcontext():
                flush(path)
        check()
        _rename_into_place(work, target, hidden_beside(target, ".old"))
    finally:
        with uninterrupted():
            shutil.rmtree(work, ignore_errors=True)


def hidden_beside(target: Path, ending: str = ".unfinished") -> Path:
    """A hidden path beside a folder, with a name that no other run uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{ending}")


def _rename_into_place(work: Path, target: Path, aside: Path) -> None:
    """Rename ``work`` to ``target``; a folder of that name is kept in ``aside`` meanwhile."""
    with uninterrupted():
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(work, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    waiting: list[int] = []

    def wait(number: int, frame: Any) -> None:
        waiting.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, wait) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for waited in waiting:
            signal.raise_signal(waited)
