"""Greedy generation by transformers' own ``generate``, which optimum's models share."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """So many tokens after each prompt, their log-probabilities, and how clear each choice was.

    A gap is that between the two largest logits: where it is tiny, rounding decides.
    """
    model.generation_config.eos_token_id = None  # all engines go on to the same length
    found: dict[str, Any] = {"tokens": [], "log_probabilities": [], "gaps": []}
    for ids in prompts:
        prompt = torch.tensor([ids])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, len(ids) :]
        logits = torch.stack([torch.as_tensor(step[0]) for step in output.logits]).double()
        top = logits.topk(2).values
        scores = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found["tokens"].append(tokens.tolist())
        found["log_probabilities"].append(scores.tolist())
        found["gaps"].append((top[:, 0] - top[:, 1]).tolist())
    return found
