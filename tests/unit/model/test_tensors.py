"""Parameters that are not saved: loading computes them from the config, for any width anew."""

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from transformers import MarianConfig, MarianMTModel

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, prunable
from tp_hf_config.model.tensors import select

FOLLOWS = (
    "with a smaller d_model, the class does not compute what remains of the original: "
    "model.encoder.embed_positions.weight is not saved, and computed from the config it holds "
    "other values"
)
IDS = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "decoder_input_ids": torch.tensor([[1, 5, 6]])}


SHAPE = (5, 6, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_select(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (*SHAPE, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype)[..., 0]
    positions = {dim: torch.tensor([0, 2, SHAPE[dim] - 1, 2]) for dim in dims}
    expected = tensor
    for dim, index in positions.items():
        expected = expected.index_select(dim, index)
    for given in (tensor, tensor.transpose(0, 2).contiguous().transpose(0, 2)):
        selected = select(given, positions)
        assert selected.dtype == dtype
        assert selected.is_contiguous()
        assert torch.equal(selected.view(torch.uint8), expected.contiguous().view(torch.uint8))


def marian() -> MarianMTModel:
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=48,
        decoder_vocab_size=48,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=2,
    )
    return MarianMTModel(config).eval()


def pruner_of(model: MarianMTModel, *fields: str) -> tp.pruner.MetaPruner:
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=fields)],
    )


def test_a_width_that_sets_their_values_is_refused() -> None:
    model = marian()
    (width,) = [w for w in prunable(model).widths if w.name == "d_model"]
    assert width.reason == FOLLOWS
    with pytest.raises(UnsupportedModelError) as raised:
        pruner_of(model, "d_model")
    assert FOLLOWS in str(raised.value)
    assert model.config.d_model == 32


def test_others_go_and_load_again_with_the_same_positions(tmp_path: Path) -> None:
    model = marian()
    pruner_of(model, "encoder_ffn_dim", "decoder_ffn_dim").step()
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (32, 32)
    model.save_pretrained(tmp_path)
    loaded = MarianMTModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**IDS).logits, loaded(**IDS).logits)
