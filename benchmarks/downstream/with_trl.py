"""TRL: supervised fine-tuning for a few steps."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from perplexity import load, perplexity
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def sft(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Train all weights on other windows; save, and load it again."""
    model = load(folder, dtype=torch.float32)
    before = perplexity(lambda ids: model(ids).logits, asked["windows"])
    with TemporaryDirectory() as name:
        settings = SFTConfig(
            output_dir=name,
            max_length=256,
            per_device_train_batch_size=2,
            max_steps=8,
            learning_rate=2e-5,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,  # by itself: autocast around the model in memory
            seed=0,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"text": asked["trained_texts"]}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
        trainer.save_model(name)
        model.eval()
        loaded = load(Path(name), dtype=torch.float32)
        ids = torch.tensor(asked["windows"][:1])
        with torch.no_grad():
            off = float((loaded(ids).logits - model(ids).logits).abs().max())
        after = perplexity(lambda ids: loaded(ids).logits, asked["windows"])
    return {"before": before, "perplexity": after, "off": off}
