"""The README's first example, with the real model that it names: it still speaks afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import doc_blocks
import prune_smollm2
import pytest
import small
import torch

from tp_hf_config.hook.registration import hooks_of

README = (small.ROOT / "README.md").read_text(encoding="utf-8")
FIRST = next(b for b in doc_blocks.blocks(README, "README.md") if b.language == "python")
texts: Any = small.module_of(small.ROOT / "benchmarks" / "quality" / "texts.py")


@pytest.mark.full
def test_the_first_example_leaves_a_model_that_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_smollm2.console, "quiet", True)
    unpruned, tokenizer = prune_smollm2.load_smollm2()
    for each in (unpruned, tokenizer):
        each.save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    evaluated = prune_smollm2.split_text(tokenizer, False)[1], texts.second_windows(tokenizer, 8)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    doc_blocks.run_python(FIRST, names)
    model = names["model"].eval()
    config = model.config
    assert (config.hidden_size, config.intermediate_size) == (576, 1344)
    result = hooks_of(names["pruner"])[0].last_report.refits
    assert result.refit < 0.5
    for windows in evaluated:
        before, after = (prune_smollm2.perplexity(m, windows) for m in (unpruned, model))
        assert after < 1.35 * before
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    for asked in (prompt, prune_smollm2.prompt_ids(tokenizer)):
        with torch.inference_mode():
            answer = prune_smollm2.greedy(model, asked)[0, asked.shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
