"""Sizes after quantisation: small models by hand, SmolLM2's, and what cannot be told.

``benchmarks/quantised.py`` compares them with files that llama.cpp's own quantiser wrote.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import gguf
import pytest
import small
import torch
import transformers as hf
from planned import SMOLLM2, changed
from torch import nn

from tp_hf_config.model.build import Refusal
from tp_hf_config.planning import quantised
from tp_hf_config.planning.quantised import FORMATS, quantised_bytes

VOCABULARY = 64
# bytes of 256 weights in a K-quant's block, and of 32 in others
Q4_K, Q5_K, Q6_K = 144, 176, 210
Q4_0, Q5_0, Q8_0 = 18, 22, 34
FP16, FP32 = 2, 4


def meta(cls: Any, config: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model.to(dtype)


def llama(hidden: int = 256, ffn: int = 512, **changes: Any) -> nn.Module:
    """Heads have 64 channels, and the four of a layer make rows of 256 for its output."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    config = hf.LlamaConfig(**{**values, **changes})
    return meta(hf.LlamaForCausalLM, config)


def smollm2(ffn: int) -> nn.Module:
    return meta(hf.LlamaForCausalLM, changed(SMOLLM2, intermediate_size=ffn))


def size(model: nn.Module, format: str, folder: Path | None = None) -> int:
    found = quantised_bytes(model, format, folder)
    assert isinstance(found, int), found
    return found


def reason(model: nn.Module, format: str) -> str:
    found = quantised_bytes(model, format)
    assert isinstance(found, Refusal), found
    return found.reason


def file_of(tensors: dict[str, int], vectors: int) -> int:
    """The bytes of a GGUF file of these tensors; ``vectors`` of them have one dimension."""
    described = sum(8 + len(name) + 4 + 8 * 2 + 4 + 8 for name in tensors) - 8 * vectors
    assert all(number % 32 == 0 for number in tensors.values()), "aligned"
    return 24 + described + sum(tensors.values())


def one_layer(hidden: int, tables: tuple[int, int], rows: dict[str, int], down: int) -> int:
    """The file of ``llama(hidden)``: bytes of a row of each kind, and of the whole ``ffn_down``."""
    token, head = tables
    return file_of(
        {
            "token_embd.weight": VOCABULARY * token,
            "output.weight": VOCABULARY * head,
            "output_norm.weight": hidden * FP32,
            "blk.0.attn_norm.weight": hidden * FP32,
            "blk.0.ffn_norm.weight": hidden * FP32,
            "blk.0.attn_q.weight": 256 * rows["q"],
            "blk.0.attn_k.weight": 256 * rows["q"],
            "blk.0.attn_v.weight": 256 * rows["v"],
            "blk.0.attn_output.weight": hidden * rows["output"],
            "blk.0.ffn_gate.weight": rows["ffn"] * rows["q"],
            "blk.0.ffn_up.weight": rows["ffn"] * rows["q"],
            "blk.0.ffn_down.weight": down,
        },
        vectors=3,
    )


class TestGGUFByHand:
    """One layer counts as the first eighth: its values and ``ffn_down`` get more bits."""

    @pytest.mark.parametrize(
        ("ffn", "down"),
        [
            (512, 256 * 2 * Q6_K),
            (288, 256 * 9 * Q8_0),  # a multiple of 32
            (290, 256 * 290 * FP16),  # of neither
        ],
    )
    def test_q4_k_m_by_ffn(self, ffn: int, down: int) -> None:
        rows = {"q": Q4_K, "v": Q6_K, "output": Q4_K, "ffn": ffn}
        expected = one_layer(256, (Q4_K, Q6_K), rows, down)
        assert size(llama(ffn=ffn), "gguf-q4_k_m") == expected

    def test_q4_k_m_of_a_hidden_size_of_nine_32s(self) -> None:
        rows = {"q": 9 * Q5_0, "v": 9 * Q8_0, "output": Q4_K, "ffn": 512}
        expected = one_layer(288, (9 * Q5_0, 9 * Q8_0), rows, 288 * 2 * Q6_K)
        assert size(llama(288), "gguf-q4_k_m") == expected

    def test_other_types(self) -> None:
        def all_of(row: int, table: int, more: int = 0) -> int:
            more = more or row
            rows = {"q": row, "v": more, "output": row, "ffn": 512}
            return one_layer(256, (row, table), rows, 256 * 2 * more)

        expected = {
            "gguf-f16": all_of(256 * FP16, 256 * FP16),
            "gguf-q8_0": all_of(8 * Q8_0, 8 * Q8_0),
            "gguf-q6_k": all_of(Q6_K, Q6_K),
            "gguf-q5_k_m": all_of(Q5_K, Q6_K, more=Q6_K),
            "gguf-q4_0": all_of(8 * Q4_0, Q6_K),
        }
        assert {name: size(llama(), name) for name in expected} == expected

    def test_a_tied_table_has_the_heads_type(self) -> None:
        untied, tied = (
            size(llama(tie_word_embeddings=tie), "gguf-q4_k_m") for tie in (False, True)
        )
        assert untied - tied == VOCABULARY * Q4_K + 8 + len("output.weight") + 4 + 16 + 4 + 8
        assert tied > size(llama(tie_word_embeddings=True), "gguf-q4_0")

    def test_half_of_sixteen_layers_get_more_bits(self) -> None:
        found, plain = (
            size(llama(num_hidden_layers=16), name) for name in ("gguf-q4_k_m", "gguf-q4_0")
        )
        # the first two, the last two, and 4, 7, 10, 13
        assert found - plain == 8 * (256 + 2 * 256) * (Q6_K - Q4_K)

    def test_layers_are_in_the_order_of_their_numbers(self) -> None:
        """Of 12, layers 0, 3, 6, 9, 10 and 11 get more bits; by name, 3 would be the sixth."""
        model: Any = llama(num_hidden_layers=12)
        sizes = [size(model, "gguf-q4_k_m")]
        for layer in (3, 7):
            with torch.device("meta"):
                model.model.layers[layer].mlp.down_proj = nn.Linear(1024, 256, bias=False)
            sizes.append(size(model, "gguf-q4_k_m"))
        wider = [after - before for before, after in pairwise(sizes)]
        assert wider == [256 * 2 * Q6_K, 256 * 2 * Q4_K]

    def test_a_conv1d_of_gpt2_is_turned(self) -> None:
        """Its weights are inputs by outputs, and rows of the file are outputs by inputs."""

        def gpt2(ffn: int) -> int:
            config = hf.GPT2Config(vocab_size=64, n_embd=256, n_inner=ffn, n_layer=1, n_head=4)
            return size(meta(hf.GPT2LMHeadModel, config), "gguf-q4_k_m")

        up, biases = (320 - 290) * Q4_K, (320 - 290) * FP32
        # 290 biases take 1160 bytes, and the file's alignment 24 more
        assert gpt2(320) - gpt2(290) == (up + biases - 24 + 256 * 10 * Q8_0 - 256 * 290 * FP16)

    @pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 keeps experts apart")
    def test_eight_experts_give_attention_more_bits(self) -> None:
        def mixtral(experts: int) -> int:
            config = hf.MixtralConfig(
                vocab_size=64,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_local_experts=experts,
            )
            return size(meta(hf.MixtralForCausalLM, config), "gguf-q4_k_m")

        router = 256 * FP32
        expert = 2 * 512 * Q4_K + 256 * 2 * Q6_K
        attention = 256 * (8 * Q8_0 - Q4_K + 8 * Q8_0 - Q6_K + Q5_K - Q4_K)
        assert mixtral(8) - mixtral(7) == router + expert + attention
        assert mixtral(7) - mixtral(6) == router + expert

    def test_berts_pooler_is_dropped(self) -> None:
        def bert(pooler: bool) -> int:
            config = hf.BertConfig(
                vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
            )
            with torch.device("meta"):
                return size(hf.BertModel(config, add_pooling_layer=pooler), "gguf-q8_0")

        assert bert(pooler=True) == bert(pooler=False)


class TestSmolLM2:
    """docs/sizes.md has these as files; the figures are without the tokenizer."""

    @pytest.mark.parametrize(("ffn", "megabytes"), [(1536, 103.5), (1228, 120.5), (1280, 94.4)])
    def test_q4_k_m(self, ffn: int, megabytes: float) -> None:
        assert size(smollm2(ffn), "gguf-q4_k_m") == pytest.approx(megabytes * 1e6, rel=0.003)

    def test_pruning_off_the_grid_makes_it_larger(self) -> None:
        whole, off, on = (size(smollm2(ffn), "gguf-q4_k_m") for ffn in (1536, 1228, 1280))
        assert on < whole < off
        whole, off, on = (size(smollm2(ffn), "gguf-f16") for ffn in (1536, 1228, 1280))
        assert off < on < whole

    def test_types_without_a_fallback_stop_the_quantiser(self) -> None:
        for name in ("gguf-q8_0", "gguf-q4_0"):
            told = reason(smollm2(1228), name)
            assert "blk.0.ffn_down.weight" in told
            assert "rows of 1228 weights are no multiple of 32" in told

    def test_a_table_that_fits_nothing_stops_it_too(self) -> None:
        told = reason(llama(292), "gguf-q4_k_m")
        assert "token_embd.weight" in told or "output.weight" in told


class TestVocabulary:
    DATA: dict[str, Any] = {  # noqa: RUF012
        "model": {"vocab": {"a": 0, "Ġb": 1, "ab": 2}, "merges": [["a", "b"], ["Ġ", "b"]]},
        "added_tokens": [{"content": "<s>"}, {"content": "a"}],
    }
    TOKENS = (8 + 1) + (8 + 3) + (8 + 2) + (8 + 3)
    UNUSED = sum(8 + len(f"[PAD{n}]") for n in range(4, VOCABULARY))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "tokenizer.json").write_text(json.dumps(self.DATA), encoding="utf-8")
        return tmp_path

    def added(self, folder: Path) -> int:
        return size(llama(), "gguf-q4_k_m", folder) - size(llama(), "gguf-q4_k_m")

    def test_tokens_types_and_merges(self, folder: Path) -> None:
        merges = (8 + 3) + (8 + 4)
        assert self.added(folder) == self.TOKENS + self.UNUSED + merges + 4 * VOCABULARY

    def test_scores_for_merges(self, folder: Path) -> None:
        (folder / "tokenizer.model").touch()
        assert self.added(folder) == self.TOKENS + self.UNUSED + 2 * 4 * VOCABULARY

    def test_a_vocabulary_with_scores(self, folder: Path) -> None:
        vocabulary = [["a", -1.0], ["Ġb", -2.0], ["ab", -3.0]]
        model = {"type": "Unigram", "vocab": vocabulary}
        text = json.dumps({**self.DATA, "model": model})
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        assert self.added(folder) == self.TOKENS + self.UNUSED + 2 * 4 * VOCABULARY

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        assert self.added(tmp_path) == 0


class TestLinearWeights:
    LINEAR = 4 * 256 * 256 + 3 * 256 * 512
    KEPT = FP16 * (2 * VOCABULARY * 256 + 3 * 256)

    def test_w4a16(self) -> None:
        expected = self.KEPT + self.LINEAR // 2 + self.LINEAR // 128 * FP16 + 7 * 16
        assert size(llama(), "w4a16") == expected

    def test_int8(self) -> None:
        rows = 4 * 256 + 2 * 512 + 256
        assert size(llama(), "int8") == self.KEPT + self.LINEAR + 4 * rows

    def test_int4(self) -> None:
        expected = self.KEPT + self.LINEAR // 2 + self.LINEAR // 128 * 2 * FP16
        assert size(llama(), "int4") == expected

    def test_w4a16_refuses_what_int4_skips(self) -> None:
        told = reason(llama(ffn=448), "w4a16")
        assert "layers.0.mlp.down_proj has 448 inputs" in told
        fits = 4 * 256 * 256 + 2 * 256 * 448
        expected = self.KEPT + fits // 2 + fits // 128 * 2 * FP16 + FP16 * 448 * 256
        assert size(llama(ffn=448), "int4") == expected

    def test_a_tied_head_is_counted_once(self) -> None:
        untied, tied = (size(llama(tie_word_embeddings=tie), "int8") for tie in (False, True))
        assert untied - tied == FP16 * VOCABULARY * 256

    @pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 keeps experts apart")
    def test_experts_in_one_tensor(self) -> None:
        config = hf.MixtralConfig(
            vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1
        )
        assert "holds all experts" in reason(meta(hf.MixtralForCausalLM, config), "w4a16")


class TestNotTold:
    def test_an_unknown_format(self) -> None:
        told = reason(llama(), "gguf-q9")
        assert told.startswith("no format 'gguf-q9'")
        assert all(name in told for name in FORMATS)

    def test_tensors_without_a_name(self) -> None:
        model: Any = llama()
        with torch.device("meta"):
            model.model.extra = nn.Linear(4, 4)
        assert "no name of its own for model.extra.weight" in reason(model, "gguf-q8_0")

    def test_falcon(self) -> None:
        config = hf.FalconConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1
        )
        assert "Falcon" in reason(meta(hf.FalconForCausalLM, config), "gguf-q8_0")

    def test_no_linear_layers(self) -> None:
        config = hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4)
        assert "no linear layers" in reason(meta(hf.GPT2LMHeadModel, config), "int8")

    def test_without_gguf(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quantised, "find_spec", lambda _: None)
        assert "pip install 'tp-hf-config[gguf]'" in reason(llama(), "gguf-q8_0")
        assert size(llama(), "int8") > 0


def test_tables_of_gguf_stay_as_they_are() -> None:
    before = dict(gguf.TensorNameMap.block_mappings_cfg)
    quantised_bytes(hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=1)), "gguf-q8_0")
    assert gguf.TensorNameMap.block_mappings_cfg == before


def test_gguf_writes_names_of_one_architecture_into_the_table_of_all() -> None:
    """Once this fails, gguf is mended, and ``Names`` in ``quantised.py`` can go."""

    class Own(gguf.TensorNameMap):
        block_mappings_cfg: ClassVar[dict[Any, Any]] = {}

    Own(gguf.MODEL_ARCH.ARCTIC, 1)
    assert Own.block_mappings_cfg
