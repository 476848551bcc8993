"""Copy what belongs to a model besides its weights: tokenizer, processor, licence, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.building import AUTO_MODELS
from ..checkpoint.folder import CONFIG, read_weights
from ..checkpoint.writing import write_config
from ..errors import CheckpointError, PipelineError
from .source import Source, cached_model, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LICENCES = ("LICENSE*", "NOTICE*")  # copied with every format
_BELONG = (
    "tokenizer*",
    "*tokenizer/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "alphabet.json",
    "language_model/attrs.json",
    "language_model/unigrams.txt",
    "language_model/*.arpa",
    "language_model/*.bin",
    "speaker_embeddings*",
    "speaker_embeddings/*",
    "speaker_embeddings/*/*",
    "audio_tokenizer_config.json",
    "vocab*",
    "merges.txt",
    "normalizer.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "prophetnet.tokenizer",
    "target_vocab.json",
    "*tekken*.json",
    "word_pronunciation.json",
    "word_shape.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*preprocessor_config.json",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    *LICENCES,
)
_CODE = "*.py"
_WRITTEN_ANEW = ("config.json", "generation_config.json", "README.md", "*.index.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


@dataclass(frozen=True)
class Copied:
    """The names of the files that were copied, and of those that were not.

    Attributes:
        files: the files that were copied.
        not_copied: the other files, except weights, hidden files and files that are written anew.
        notes: further notes for the user.
    """

    files: tuple[str, ...]
    not_copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def copy_companions(
    source: Source,
    out: Path,
    wanted: tuple[str, ...] = _BELONG,
    without: Collection[str] = (),
) -> Copied:
    """Copy a model's files that match ``wanted``, and its trusted code, to ``out``.

    Links are followed only into the model's folder or the Hub's cache. Existing files are kept, but
    config.json no longer names code that is not there.
    """
    if source.gguf is not None:
        return Copied(()) if wanted == LICENCES else _tokenizer_in_file(source, out)
    folder = (source.folder or snapshot(source)).resolve()
    if source.trust_remote_code and wanted != LICENCES:
        wanted = (*wanted, _CODE)
    roots = [folder]
    cached = cached_model(folder)
    if cached is not None:  # the Hub's cache stores links to blobs
        roots.append((cached / "blobs").resolve())
    copied, not_copied = [], []
    weights = _weights_of(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        passed_over = name in weights or _matches(name, _WRITTEN_ANEW + _WEIGHTS)
        if not path.is_file() or name.startswith(".") or passed_over:
            continue
        if (out / name).exists():  # the code of a generated class, saved with the model
            continue
        inside = any(path.resolve().is_relative_to(root) for root in roots)
        if not inside or name in without or not _matches(name, wanted):
            not_copied.append(name)
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
        copied.append(name)
    _forget_missing_code(out)
    return Copied(tuple(copied), tuple(not_copied))


def _weights_of(folder: Path) -> tuple[str, ...]:
    try:
        return read_weights(folder).files
    except CheckpointError:  # a Hub model's folder has only the small files
        return ()


def _tokenizer_in_file(source: Source, out: Path) -> Copied:
    try:
        files = tokenizer_of(source).save_pretrained(out)
    except PipelineError as error:
        return Copied((), notes=(f"the result has no tokenizer: {error}",))
    return Copied(tuple(sorted(Path(file).name for file in files)))


def _forget_missing_code(folder: Path) -> None:
    """Remove from config.json's ``auto_map`` the classes whose code is not in the folder."""
    config = folder / CONFIG
    data = json.loads(config.read_bytes()) if config.is_file() else {}
    auto_map = data.get("auto_map") or {}
    kept = {
        auto: reference
        for auto, reference in auto_map.items()
        if not isinstance(reference, str)
        or "--" in reference  # it is on the Hub
        or (folder / f"{reference.partition('.')[0]}.py").is_file()
    }
    if kept != auto_map:
        data["auto_map"] = kept
        if not kept:
            del data["auto_map"]
        write_config(folder, data)


def code_files(config: PreTrainedConfig) -> set[str]:
    """Return the names of the files with the code of a config's class and its model's."""
    return {
        f"{reference.rpartition('--')[2].partition('.')[0]}.py"  # "us/model--file.Class"
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith(("AutoConfig", *AUTO_MODELS))
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """True if a pattern matches; stars match no slash."""
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


def snapshot(source: Source) -> Path:
    """Download the small files of a Hub model; return their folder in the Hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.place,
                # settings and texts: Copied lists them
                allow_patterns=[*_BELONG, _CODE, "README.md", "*.json", "*.txt"],
                ignore_patterns=["*.index.json"],
            )
        )
    except Exception as error:  # from the network, the Hub or the cache
        raise PipelineError(
            f"{source.name}: its tokenizer and processor files cannot be downloaded: {error}"
        ) from error
