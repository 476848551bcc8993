"""Layers whose weight is computed of a direction and a length, as in audio codecs and vocoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook


def codec() -> hf.EncodecModel:
    torch.manual_seed(0)
    config = hf.EncodecConfig(
        num_filters=8,
        upsampling_ratios=[2, 2],
        hidden_size=32,
        codebook_dim=32,
        codebook_size=16,
        num_lstm_layers=1,
    )
    return hf.EncodecModel(config).eval()


@pytest.mark.parametrize(
    ("width", "values", "channels"),
    [
        ("num_filters", {"num_filters": 4}, 4),
        ("codebook_dim + hidden_size", {"codebook_dim": 16, "hidden_size": 16}, 8),
    ],
    ids=["channels of every layer", "what is quantised"],
)
def test_half_of_a_codec(width: str, values: dict[str, int], channels: int, tmp_path: Path) -> None:
    model = codec()
    assert model.encoder.layers[0].conv.out_channels == 8
    hook = HFConfigSyncHook(prune=width.split(" + "))
    tp.pruner.BasePruner(
        model,
        example_inputs=None,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    assert {name: new for name, (_, new) in hook.reports[-1].fields.items()} == values
    first = model.encoder.layers[0].conv
    assert first.weight.shape[0] == first.bias.shape[0] == first.out_channels == channels
    model.save_pretrained(tmp_path)
    again = hf.EncodecModel.from_pretrained(tmp_path).eval()
    sound = torch.randn(1, 1, 64)
    with torch.no_grad():
        ours, theirs = model(sound).audio_values, again(sound).audio_values
    assert bool(ours.isfinite().all())
    assert torch.equal(ours, theirs)
