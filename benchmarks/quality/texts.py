"""The texts: what models are measured on, and what tells how good they are."""

from __future__ import annotations

import ast
import random
import re
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tp_hf_config.calibration.batches import second_text as passages
from tp_hf_config.calibration.batches import shipped_text

WINDOW = 256
SOURCES = ("argparse", "ast", "asyncio.base_events", "asyncio.tasks", "tarfile", "unittest.mock")
LICENCES = (  # of packages that `make bench` installs
    "torch",
    "transformers",
    "numpy",
    "networkx",
    "sympy",
    "regex",
    "typing_extensions",
    "tqdm",
    "filelock",
    "fsspec",
    "rich",
)
MATHEMATICS = (  # modules whose docstrings are mathematics, of packages that torch needs
    "sympy.series.formal",
    "sympy.ntheory.residue_ntheory",
    "sympy.polys.polytools",
    "sympy.stats.crv_types",
    "networkx.algorithms.centrality.betweenness",
    "networkx.algorithms.flow.maxflow",
    "networkx.algorithms.isomorphism.isomorphvf2",
    "networkx.algorithms.link_analysis.pagerank_alg",
)
_LONGEST = 12_000  # characters of a licence, so that one does not fill the text
_CHATS = 16  # conversations that are written at once
_QUESTION, _ANSWER = 96, 256  # tokens at most


def second_text() -> tuple[str, str]:
    """Source code of the standard library, and licences of packages.

    No paragraph of it is in a text that models are calibrated on.
    """
    seen = {_plain(p) for topic in topics.values() for p in topic.split("\n\n")}
    seen |= {_plain(p) for p in shipped_text().split("\n\n")}
    parts: list[str] = []
    for texts in (map(_source, SOURCES), map(_licence, LICENCES)):
        paragraphs: list[str] = []
        for text in texts:
            for paragraph in text.split("\n\n"):
                if _plain(paragraph) not in seen:
                    seen.add(_plain(paragraph))
                    paragraphs.append(paragraph)
        parts.append("\n\n".join(paragraphs))
    return parts[0], parts[1]


def _docstrings(module: str) -> str:
    """All docstrings of a module's source, in their order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = (n for n in ast.walk(ast.parse(_source(module))) if isinstance(n, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module}: there is no source file of it here")
    return Path(spec.origin).read_text(encoding="utf-8")


def _licence(package: str) -> str:
    found = [f for f in files(package) or [] if re.match(r"LICEN[SC]E|COPYING", f.name)]
    if not found:
        raise SystemExit(f"{package}: the installed package has no file with its licence")
    shortest = min(found, key=lambda file: (len(file.parts), str(file)))
    return Path(str(shortest.locate())).read_text(encoding="utf-8")[:_LONGEST]


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def second_windows(tokenizer: Tokenizer, evaluated: int) -> Tensor:
    """Windows of the second text, as many of code as of licences, evenly spaced in both."""
    halves = evaluated - evaluated // 2, evaluated // 2
    texts = zip(second_text(), halves, strict=True)
    return torch.cat([_windows(text, tokenizer, count) for text, count in texts])


def other_windows(tokenizer: Tokenizer, evaluated: int) -> dict[str, Tensor]:
    """Windows of two more texts: passages of general prose, and mathematics in docstrings."""
    mathematics = "\n\n".join(map(_docstrings, MATHEMATICS))
    texts = {"prose": passages(), "mathematics": mathematics}
    return {name: _windows(text, tokenizer, evaluated) for name, text in texts.items()}


def _windows(text: str, tokenizer: Tokenizer, count: int) -> Tensor:
    """So many windows of a text, evenly spaced; all, if it has fewer."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return rows[:: max(1, len(rows) // max(1, count))][:count]


def shared(evaluated: Tensor, others: Tensor, length: int = 13) -> float:
    """The share of an evaluation text's runs of so many tokens that are in other windows too."""

    def runs(windows: Tensor) -> list[tuple[int, ...]]:
        return [tuple(run) for row in windows for run in row.unfold(0, length, 1).tolist()]

    known, asked = set(runs(others)), runs(evaluated)
    return sum(run in known for run in asked) / len(asked)


def paragraphs_without(sentences: list[str], count: int, seed: int) -> list[str]:
    """Paragraphs of the Python reference in which none of some sentences is."""
    found = dict.fromkeys(_plain(p) for name in sorted(topics) for p in topics[name].split("\n\n"))
    whole = [p for p in found if len(p) >= 80 and not any(s in p for s in sentences)]
    if len(whole) < count:
        raise SystemExit(f"the reference has {len(whole)} such paragraphs, expected {count}")
    random.Random(seed).shuffle(whole)
    return whole[:count]


def second_sentences(count: int, seed: int) -> list[str]:
    """Sentences of the second text: comments, docstrings and clauses."""
    text = _plain("\n".join(second_text()))
    sentences = [s for s in re.split(r"(?<=[.:!?;]) ", text) if 40 <= len(s) <= 200]
    sentences = [s for s in dict.fromkeys(sentences) if s[0].isupper()]
    if len(sentences) < count:
        raise SystemExit(f"the second text has {len(sentences)} sentences, expected {count}")
    random.Random(seed).shuffle(sentences)
    return sentences[:count]


def own_chats(model: Model, tokenizer: Tokenizer, windows: int, seed: int) -> Tensor:
    """What a model writes through its chat template: the user's turn, then the answer to it.

    The conversations are put one behind the other, template and all, and cut into windows.
    """
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
    opening = str(shown).partition("\0")[0]
    stream: list[int] = []
    tokenizer.padding_side = "left"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(stream) < windows * WINDOW:
            asked = _written(model, tokenizer, [opening] * _CHATS, _QUESTION)
            questions = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in asked]
            prompts = [
                str(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": question.strip()}],
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
                for question in questions
                if question.strip()
            ]
            for prompt, answer in zip(
                prompts, _written(model, tokenizer, prompts, _ANSWER), strict=True
            ):
                stream += tokenizer(prompt, add_special_tokens=False)["input_ids"] + answer
    return torch.tensor(stream[: windows * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def _written(
    model: Model, tokenizer: Tokenizer, prompts: list[str], longest: int
) -> list[list[int]]:
    """What a model samples after prompts, with the token that ends a turn."""
    if not prompts:
        return []
    given = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    end = tokenizer.eos_token_id
    generate: Any = model.generate
    ids = generate(
        **given,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=longest,
        eos_token_id=end,
        pad_token_id=end,
    )
    written = ids[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in written]
