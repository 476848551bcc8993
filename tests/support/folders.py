"""Checkpoint folders to check, break and repair; and what Transformers itself says of them."""

from __future__ import annotations

import json
import shutil
import struct
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import small
import tiny
import torch
import transformers as hf
import zoo
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

hf_logging.disable_progress_bar()

_TEXT = {**zoo._GQA, **zoo._FLOAT32}
_VISION = {**zoo._VISION, **zoo._FLOAT32, "projection_dim": 64}
PARTIAL = "partial_rotary_factor"
BITS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}


def _llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_TEXT), vision_config=hf.CLIPVisionConfig(**_VISION)
    )
    config.image_token_index = config.image_token_id = 98
    return hf.LlavaForConditionalGeneration(config)


_OTHERS = {
    "llava": _llava,
    "bert-lm": lambda: hf.BertForMaskedLM(hf.BertConfig(**tiny._SIZES)),
    "gemma3-deep": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**{**_TEXT, "num_hidden_layers": 8}, head_dim=16)
    ),
    "llama-deep": lambda: small.llama(num_hidden_layers=6),
}


@lru_cache
def _kept(name: str, options: tuple[tuple[str, Any], ...]) -> TemporaryDirectory[str]:
    model = _OTHERS[name]() if name in _OTHERS else (zoo if name in zoo.NAMES else tiny).build(name)
    place = TemporaryDirectory()
    model.save_pretrained(Path(place.name) / "model", **dict(options))
    path = Path(place.name) / "model" / "config.json"
    path.write_text(json.dumps(_for_both(json.loads(path.read_text())), indent=2) + "\n")
    return place


def _for_both(data: Any) -> Any:
    """A config with what Transformers 4 reads of rotary embeddings beside what 5 reads."""
    if not isinstance(data, dict):
        return data
    found = {key: _for_both(value) for key, value in data.items()}
    rope = data.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        rest = {key: rope[key] for key in rope if key not in ("rope_theta", PARTIAL)}
        found["rope_theta"] = rope["rope_theta"]
        found |= {PARTIAL: rope[PARTIAL]} if PARTIAL in rope else {}
        found |= {"rope_scaling": rest} if rest.keys() - {"rope_type", "type"} else {}
    return found


def of_transformers_5(folder: Path, **rope: Any) -> Path:
    """Give a folder's config rotary embeddings as Transformers 5 writes them: in one place."""
    data = config_of(folder)
    part = data.get("text_config", data)
    for name in ("rope_theta", "rope_scaling", PARTIAL):
        part.pop(name, None)
    part["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default", **rope}
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    return folder


def saved(name: str, folder: Path, **options: Any) -> Path:
    """What a class's own ``save_pretrained`` writes, and what older readers need beside it."""
    kept = Path(_kept(name, tuple(options.items())).name) / "model"
    shutil.copytree(kept, folder / "model")
    return folder / "model"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit(folder: Path, **fields: Any) -> Path:
    """Change fields of config.json; ``None`` takes one out."""
    data = {**config_of(folder), **fields}
    data = {key: value for key, value in data.items() if fields.get(key, 0) is not None}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def with_a_narrow_layer(place: Path) -> Path:
    """A Llama of which one layer lost other FFN channels than the rest."""
    folder = saved("llama-deep", place)
    tensors = load_file(folder / "model.safetensors")
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.3.mlp.{part}_proj.weight"
        tensors[name] = tensors[name].narrow(dim, 0, 40).contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return found


def with_header(path: Path, header: dict[str, Any] | bytes) -> None:
    """Give a safetensors file another header; its data stays."""
    data = path.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[begin:])


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file whose header is right and whose data is a hole."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = BITS[dtype]
        for one in shape:
            size *= one
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def loads(folder: Path, exactly: bool = False) -> bool:
    """Whether ``from_pretrained`` finds every weight, in its shape; exactly: and nothing else."""
    level = hf_logging.get_verbosity()
    try:
        hf_logging.set_verbosity(50)
        model_class = getattr(hf, config_of(folder)["architectures"][0])
        if _needs_more_than_there_is(model_class, folder):
            return False  # to see that by loading would take minutes, and gigabytes
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
    except Exception:
        return False
    finally:
        hf_logging.set_verbosity(level)
    wrong = info["missing_keys"] or info["mismatched_keys"]
    return not wrong and not (exactly and info["unexpected_keys"])


def _needs_more_than_there_is(model_class: Any, folder: Path) -> bool:
    """Whether one tensor of the class has more numbers than the files have bytes."""
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(folder))
    except Exception:
        return False
    there = sum(path.stat().st_size for path in folder.iterdir())
    return any(parameter.numel() > there for parameter in model.parameters())


def logits(folder: Path, name: str) -> torch.Tensor:
    model = getattr(hf, config_of(folder)["architectures"][0]).from_pretrained(folder).eval()
    module = zoo if name in zoo.NAMES else tiny
    with torch.no_grad():
        return model(**module.inputs(model))[0]
