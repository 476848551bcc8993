"""Shared by the tests of training: models without dropout, a batch, a pruner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook

TOKENS = torch.randint(3, 40, (12, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def bert() -> hf.BertForMaskedLM:
    torch.manual_seed(0)
    config = small.bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return hf.BertForMaskedLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": small.llama,
    "llama-tied": lambda: small.llama(tie_word_embeddings=True),
    "bert": bert,
}


def gradients(model: Any) -> None:
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()


def pruner_of(model: Any, **settings: Any) -> Any:
    defaults = {"importance": tp.importance.GroupMagnitudeImportance(), "pruning_ratio": 0.25}
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        hooks=[HFConfigSyncHook(prune=small.inside(model))],
        **{**defaults, **settings},
    )
