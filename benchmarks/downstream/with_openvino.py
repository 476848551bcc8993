"""OpenVINO: exported by optimum-intel, with weights in 8 bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from optimum.intel import OVModelForCausalLM
from perplexity import perplexity, size_of


def int8(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """NNCF's compression of weights; saved, and loaded again."""
    with TemporaryDirectory() as target:
        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, load_in_8bit=True, use_cache=False
        )
        model.save_pretrained(target)
        again = OVModelForCausalLM.from_pretrained(target, use_cache=False)

        def logits(ids: torch.Tensor) -> Any:
            return again(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

        found = perplexity(logits, asked["windows"])
        return {"perplexity": found, "bytes": size_of(Path(target), "*.bin")}
