"""What belongs to a folder besides weights: tokenizer, processor, licence, code, README.md."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from ..checkpoint.building import AUTO_MODELS
from ..checkpoint.folder import CONFIG, read_weights, write_config
from ..errors import CheckpointError, PipelineError
from ..graph.unit_count import largest_multiple
from ..hook.report import in_words
from ..reports import versions
from .job import Copied, Layerwise, Pruned
from .source import Source, cached_model, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LICENCES = ("LICENSE*", "NOTICE*")  # copied with every format
_BELONG = (
    "tokenizer*",
    "*tokenizer/*",
    "*_tokens*.json",
    "alphabet.json",
    "language_model/attrs.json",
    "language_model/unigrams.txt",
    "language_model/*.arpa",
    "language_model/*.bin",
    "speaker_embeddings*",
    "speaker_embeddings/*",
    "speaker_embeddings/*/*",
    "audio_tokenizer_config.json",
    "*vocab*",
    "merges.txt",
    "normalizer.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "prophetnet.tokenizer",
    "*tekken*.json",
    "word_*.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    *LICENCES,
)
_CODE = "*.py"
# what a model card keeps of the unpruned model's
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_WRITTEN_ANEW = ("config.json", "generation_config.json", "README.md", "*.index.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


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


# The model card


def card(source: Source, pruned: Pruned) -> str:
    name = base_model(source)
    before, after = pruned.parameters
    words = in_words(pruned.fields)
    rows = [(field, old, f"{new}{_multiple(new)}") for field, (old, new) in words.items()]
    rows.append(("parameters", f"{before:,}", f"{after:,} ({after / before:.1%})"))
    lines = [f"Round trip: {pruned.proof}"]
    if pruned.dropped_layers is not None:
        lines.append(pruned.dropped_layers.title())
    for text, (old, new) in pruned.perplexity.items():
        lines.append(f"Perplexity on {text}: {old:.1f} before, {new:.1f} after")
    lines += [f"Quantised as {size}" for size in pruned.quantised]
    if pruned.speed is not None:
        change = pruned.speed[0].then(pruned.speed[1])
        lines.append(change[:1].upper() + change[1:])
    differ = pruned.layers_differ
    if differ is None:
        lines.append(f"Load it with `{pruned.model}.from_pretrained(folder)`")
    of_gguf = (s.format for s in pruned.quantised if "gguf-" in s.format and s.after is not None)
    if (format := next(of_gguf, None)) is not None:
        lines.append(
            "Quantise it with `tp-hf-config export FOLDER --to gguf --out FOLDER-gguf` and "
            "llama.cpp's `llama-quantize FOLDER-gguf/model.gguf "
            f"{format.removeprefix('gguf-').upper()}`"
        )
    return page(
        source,
        f"{name.rpartition('/')[2]}, pruned",
        f"`{name}` (`{pruned.model}`), pruned with Torch-Pruning and tp-hf-config.",
        table(("", "before", "after"), rows),
        bullets([*lines, *pruned.notes]),
        "" if differ is None else _loading(differ, pruned.out.name),
        "## How",
        table(("setting", "value"), [(k, f"`{v}`") for k, v in pruned.settings.items()]),
    )


def _multiple(width: str) -> str:
    """Say which multiple a width is of that kernels and quantisers look at, if of any."""
    number = int(width) if width.isdigit() else 0
    found = largest_multiple((number,)) if number >= 32 else 1  # fewer are heads
    return "" if found == 1 else f" (a multiple of {found})"


def _loading(layerwise: Layerwise, folder: str) -> str:
    widths = [(name, " ".join(map(str, values))) for name, values in layerwise.widths.items()]
    return f"""## Loading

```python
from transformers import {layerwise.auto_class}

model = {layerwise.loading(folder)}
```

The layers of this model have different widths, and the classes of Transformers build all layers \
alike. `{layerwise.file}`, written by tp-hf-config, builds each layer with its own widths. \
`trust_remote_code=True` allows Transformers to run that file. It imports nothing but Transformers \
(5.15 or newer). `tp-hf-config export` writes this model in formats that need no code.

Without `trust_remote_code=True`, loading fails with `AmbiguousGlobalPerLayerAttributeError` or \
with a message that `ignore_mismatched_sizes` is `False`, because the stock class has one width \
for all layers. Do not change config.json.

{table(("by layer", ""), widths)}"""


def page(source: Source | None, title: str, *parts: str) -> str:
    """Return a README.md; its metadata is that of the source, if there is one."""
    parts = (f"# {title}", *parts)
    if source is not None:
        data = ModelCardData(
            base_model=base_model(source),
            library_name="transformers",
            tags=["pruned"],
            **_metadata(source),
        )
        parts = (f"---\n{data.to_yaml()}\n---", *parts)
    installed = [("python", platform.python_version()), *versions().items()]
    return "\n\n".join(filter(None, (*parts, table(("version", ""), installed)))) + "\n"


def base_model(source: Source) -> str:
    """Return the unpruned model's name, never a path: a Hub id, or a folder's or file's name."""
    if source.gguf is not None:
        return Path(source.gguf).stem
    if source.folder is None:
        return source.place
    folder = source.folder.resolve()
    cached = cached_model(folder)
    if cached is not None and cached.name.startswith("models--"):  # models--owner--name
        return cached.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _metadata(source: Source) -> dict[str, Any]:
    if source.gguf is not None:
        return {}
    try:
        path: Any = source.folder and source.folder / "README.md"
        path = path or try_to_load_from_cache(source.place, "README.md")
        metadata = metadata_load(path) or {}
    except Exception:  # no card, or invalid YAML
        return {}
    return {key: metadata[key] for key in _KEPT if key in metadata}


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}." for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    clean = [[re.sub(r"[|\n]", " ", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *clean))
