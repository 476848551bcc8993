"""PEFT: LoRA trained, merged, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from perplexity import load, perplexity


def lora(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Train on other windows; the adapter, and the merged model, have to load as they were."""
    torch.manual_seed(0)
    base = load(folder, dtype=torch.float32)
    before = perplexity(lambda ids: base(ids).logits, asked["windows"])
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    for window in asked["trained"]:
        ids = torch.tensor([window])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    ids = torch.tensor(asked["windows"][:1])
    with TemporaryDirectory() as adapter, TemporaryDirectory() as merged, torch.no_grad():
        model.save_pretrained(adapter)
        again = PeftModel.from_pretrained(load(folder, dtype=torch.float32), adapter).eval()
        off = float((again(ids).logits - model(ids).logits).abs().max())
        whole = model.merge_and_unload()
        whole.save_pretrained(merged)
        loaded = load(Path(merged), dtype=torch.float32)
        off = max(off, float((loaded(ids).logits - whole(ids).logits).abs().max()))
    after = perplexity(lambda ids: loaded(ids).logits, asked["windows"])
    return {"before": before, "perplexity": after, "off": off}
