"""The models that the tools get: SmolLM2 and Gemma 3 270M, pruned by the commands of a user."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from perplexity import load, perplexity
from real_models import GEMMA_3, SMOLLM2, original
from transformers import AutoTokenizer

from tp_hf_config.calibration.batches import special_tokens

WINDOW = 256  # tokens
EVALUATED, TRAINED = 8, 16  # windows of one text, after each other


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        key: the name of its folder, and of the folder in commands.
        name: what is special about its widths.
        commands: what makes it of the folders before, as arguments of `tp-hf-config`.
        fits: the targets that it was made for; of their tools, none may refuse it.
        model: what was pruned.
    """

    key: str
    name: str
    commands: tuple[tuple[str, ...], ...] = ()
    fits: tuple[str, ...] = ()
    model: str = SMOLLM2


_FFN = ("--prune", "intermediate_size")
CASES = (
    Case("smollm2-135m", "unpruned"),
    Case(
        "on-grid",
        "FFN for GGUF",
        (("prune", "smollm2-135m", *_FFN, "--pruning-ratio", "0.2", "--for", "gguf-k"),),
        ("gguf-32",),  # a hidden size of 576 is no multiple of 256
    ),
    Case(
        "off-grid",
        "FFN off the grid",
        (("prune", "smollm2-135m", *_FFN, "--pruning-ratio", "0.2", "--round-to", "1"),),
    ),
    Case(
        "w4a16",
        "hidden size and FFN",  # nine heads, so LlamaConfig takes multiples of 9 only
        (
            (
                *("prune", "smollm2-135m", "--ratios", "hidden_size=0.11,intermediate_size=0.17"),
                *("--for", "w4a16,gguf-k"),  # says what cannot be
            ),
        ),
    ),
    Case(
        "by-layer",
        "FFN by layer",
        (("prune", "smollm2-135m", *_FFN, "--target-params", "0.85", "--allocate", "--per-layer"),),
    ),
    Case(
        "padded",
        "the same, padded",
        (("export", "by-layer", "--to", "padded", "--multiple-of", "256", "--trust-remote-code"),),
        ("gguf-32",),
    ),
    Case("gemma", "unpruned", model=GEMMA_3),
    Case(
        "gemma-w4a16",
        "FFN for W4A16",
        (("prune", "gemma", *_FFN, "--pruning-ratio", "0.2", "--for", "w4a16"),),
        ("w4a16", "gguf-32"),  # a multiple of 128 is one of 32
        GEMMA_3,
    ),
    Case(
        "gemma-off-grid",
        "FFN off the grid",
        (("prune", "gemma", *_FFN, "--pruning-ratio", "0.2", "--round-to", "1"),),
        model=GEMMA_3,
    ),
)


def make(case: Case, place: Path) -> dict[str, Any]:
    """Write a case's folder, unless it is there; return what the table says of it."""
    folder = place / case.key

    def made() -> dict[str, Any]:
        if not case.commands:
            assert original(case.model, place) == folder
            return _measured(folder)
        shutil.rmtree(folder, ignore_errors=True)
        for command in case.commands:
            program = [sys.executable, "-m", "tp_hf_config", *command, "--out", case.key]
            subprocess.run(program, cwd=place, check=True, stdout=subprocess.DEVNULL)
        return _measured(folder)

    commands = [" ".join(("tp-hf-config", *c, "--out", case.key)) for c in case.commands]
    told = {"model": case.model, "key": case.key, "name": case.name, "commands": commands}
    return {**once(place / f"{case.key}.json", made), **told, "fits": list(case.fits)}


def once(kept: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns, which is kept in a file, so that it runs once."""
    if not kept.exists():
        kept.write_text(json.dumps(work()), encoding="utf-8")
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def _measured(folder: Path) -> dict[str, Any]:
    """Return widths, parameters and perplexity in float32."""
    model = load(folder, dtype=torch.float32)
    ffn = sorted({layer.mlp.down_proj.in_features for layer in model.model.layers})
    width = str(ffn[0]) if len(ffn) == 1 else f"{ffn[0]} to {ffn[-1]}"
    return {
        "widths": f"{model.config.hidden_size}, {width}",
        "parameters": model.num_parameters(),
        "perplexity": perplexity(lambda ids: model(ids).logits, question(folder)["windows"]),
    }


def question(folder: Path) -> dict[str, Any]:
    """Return what every tool gets with a folder: windows of tokens, and the same as text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(topics[name] for name in ("specialnames", "class", "import", "assignment"))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start, _ = special_tokens(tokenizer)
    size = WINDOW - len(start)
    cut = [ids[i : i + size] for i in range(0, size * (EVALUATED + TRAINED), size)]
    assert len(cut[-1]) == size, "the text is too short"
    return {
        "windows": [start + window for window in cut[:EVALUATED]],
        "text": tokenizer.decode([i for window in cut[:EVALUATED] for i in window]),
        "trained": [start + window for window in cut[EVALUATED:]],
        "trained_texts": [tokenizer.decode(window) for window in cut[EVALUATED:]],
    }
