"""GGUF files for llama.cpp: widths, tensors and tokenizer read back, and what is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import differing
import gguf
import layer_zoo
import model_folders as folders
import numpy as np
import pytest
import small
import torch
import transformers as hf
import zoo
from shell import shell
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tp_hf_config import PipelineError, export
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.layer_entries import GLOBAL_READS, set_entries
from tp_hf_config.pipeline import export as export_module
from tp_hf_config.pipeline import gguf_file
from tp_hf_config.pipeline.gguf_file import vocabulary_of

pytestmark = pytest.mark.usefixtures("one_thread")
FFN, HEADS = "intermediate_size", "num_attention_heads"
TEXT = "the tower was there, and nobody there said so: it is 42 feet high\n" * 3
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_WIDE: dict[str, Any] = {**zoo._GQA, "vocab_size": 320}
differ = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)


def llama(**settings: Any) -> Callable[[], Any]:
    return lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**{**_WIDE, **settings}))


def rope(**settings: Any) -> dict[str, Any]:
    """Settings of rotary embeddings, where this Transformers reads them."""
    if small.TRANSFORMERS < (5,):
        return {"rope_scaling": settings, "rope_theta": 10000.0}
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
layer_zoo._MORE.update(
    {
        "gguf": llama(),
        "gguf_tied": llama(tie_word_embeddings=True),
        "gguf_biased": llama(attention_bias=True, mlp_bias=True),
        "gguf_qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_WIDE)),
        "gguf_window": lambda: (
            hf.MistralForCausalLM,
            hf.MistralConfig(**_WIDE, head_dim=16, sliding_window=40),
        ),
        "gguf_odd": llama(hidden_size=18, intermediate_size=23, num_attention_heads=6, head_dim=8),
        "gguf_gelu": llama(hidden_act="gelu"),
        "gguf_llama3": llama(**rope(**LLAMA3)),
        "gguf_linear": llama(**rope(rope_type="linear", factor=4.0)),
        "gguf_dynamic": llama(**rope(rope_type="dynamic", factor=4.0)),
        "gguf_yarn": llama(**rope(rope_type="yarn", factor=4.0)),
    }
)


# ------------------------------------------------------------------------------------ tokenizers


def byte_level(
    pre: Any = BYTE_LEVEL, normalizer: Any = None, bos: bool = False, **settings: Any
) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE with three control tokens and one that a user may write."""
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre, normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<start>", "<end>", "<|endoftext|>"],
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<start> $A", special_tokens=[("<start>", 0)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>"
    )


PIECES = ("th", "▁th", "▁the", "er", "▁there", "▁t", "re", "ere", "he", "▁▁")


def sentencepiece(
    pre: Any = None, normalizer: Any = None, swapped: bool = False
) -> hf.PreTrainedTokenizerFast:
    """SentencePiece's BPE: any two tokens that make up a third are merged, in the order of it."""
    tokens = ["<unk>", "<s>", "</s>", *gguf_file._BYTES, *PIECES, *"▁abcehrstw", "</", "s>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [
        (piece[:at], piece[at:])
        for piece in PIECES
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges.append(("</", "s>"))  # as converters write it, where both are tokens
    if swapped:
        merges.append(merges.pop(merges.index(("▁", "th"))))  # behind those of other tokens
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def words(size: int = 310) -> hf.PreTrainedTokenizerFast:
    """One token for each word."""
    vocab = {f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


# --------------------------------------------------------------------------------------- folders


def saved(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


def exported(
    model: Any, root: Path, tokenizer: Any = None, **settings: Any
) -> tuple[Any, gguf.GGUFReader]:
    """A model exported from a folder, and the file's reader."""
    folder = saved(model, root / "model", tokenizer)
    report = export(folder, root / "out", to="gguf", trust_remote_code=True, **settings)
    return report, gguf.GGUFReader(root / "out" / "model.gguf")


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def tensors(reader: gguf.GGUFReader) -> dict[str, tuple[str, Any]]:
    """Name -> type and data; of bfloat16 the bits."""
    found = {}
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        found[tensor.name] = (
            tensor.tensor_type.name,
            data.view(np.uint16) if tensor.tensor_type.name == "BF16" else data,
        )
    return found


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head is its row i, row 2i + 1 its row i + half."""
    dim = len(weight) // heads
    rows = [
        head * dim + (row // 2) + (row % 2) * (dim // 2)
        for head in range(heads)
        for row in range(dim)
    ]
    return weight[rows]


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def expected_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as llama.cpp wants them; zeros for a bias that only a Llama has."""
    found = {}
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for number, layer in enumerate(model.model.layers):
        if layer.self_attn.v_proj.bias is not None:
            key = f"model.layers.{number}.self_attn.o_proj.bias"
            weights.setdefault(key, torch.zeros(model.config.hidden_size))
    for key, weight in weights.items():
        inside, _, kind = key.rpartition(".")
        if inside.startswith("model.layers."):
            _, _, number, part = inside.split(".", 3)
            if part.endswith(("q_proj", "k_proj")):
                dim = model.model.layers[int(number)].self_attn.head_dim
                weight = in_pairs(weight, len(weight) // dim)
            found[f"blk.{number}.{NAMES[part]}.{kind}"] = weight
        else:
            found[f"{NAMES[inside]}.{kind}"] = weight
    return found


def assert_same_tensors(model: Any, reader: gguf.GGUFReader) -> None:
    found, expected = tensors(reader), expected_tensors(model)
    assert found.keys() == expected.keys()
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for key, weight in expected.items():
        weight = weight.float() if weight.dim() == 1 else weight
        kind, data = found[key]
        assert kind == kinds[weight.dtype], key
        bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        assert np.array_equal(data, bits.contiguous().numpy()), key


def key_value_heads_by_layer() -> Any:
    """Two layers with 2 and 1 key/value heads, 4 query heads each."""
    pruned = differing.pruned("gguf", (FFN,))
    config = copy.deepcopy(pruned.config)
    vars(config)[GLOBAL_READS] = True
    entries = [(72, 2), (48, 1)]
    set_entries(
        config,
        {n: {FFN: ffn, "num_key_value_heads": keys} for n, (ffn, keys) in enumerate(entries)},
    )
    torch.manual_seed(0)
    return type(pruned)(config).eval()


@differ
class TestLayersThatDiffer:
    @pytest.mark.parametrize("name", ["gguf", "gguf_tied", "gguf_biased", "gguf_qwen2"])
    def test_widths_and_tensors(self, name: str, tmp_path: Path) -> None:
        model = differing.pruned(name, (FFN, HEADS))
        report, reader = exported(model, tmp_path)
        assert value(reader, "general.architecture") == "deci"
        assert value(reader, "deci.block_count") == 2
        assert value(reader, "deci.feed_forward_length") == [72, 48]
        assert value(reader, "deci.attention.head_count") == [4, 2]
        assert value(reader, "deci.attention.head_count_kv") == 2
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            assert value(reader, f"deci.{key}") == 16
        assert value(reader, "deci.embedding_length") == 64
        assert value(reader, "deci.vocab_size") == 320
        assert value(reader, "deci.rope.freq_base") == 10000.0
        assert value(reader, "general.file_type") == gguf.LlamaFileType.ALL_F32
        assert_same_tensors(model, reader)
        assert report.fields == {FFN: ((72, 48),) * 2, HEADS: ((4, 2),) * 2}
        assert sorted(folders.content(tmp_path / "out")) == ["README.md", "model.gguf"]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "(`" + report.model + "` with layers that differ)" in card
        assert "Load it with `llama-cli --model model.gguf`" in card

    def test_key_value_heads_by_layer(self, tmp_path: Path) -> None:
        model = key_value_heads_by_layer()
        _, reader = exported(model, tmp_path)
        assert value(reader, "deci.attention.head_count") == 4
        assert value(reader, "deci.attention.head_count_kv") == [2, 1]
        assert_same_tensors(model, reader)

    @pytest.mark.parametrize(
        ("dtype", "kind"),
        [
            (torch.float16, gguf.LlamaFileType.MOSTLY_F16),
            (torch.bfloat16, gguf.LlamaFileType.MOSTLY_BF16),
        ],
    )
    def test_weights_are_as_wide_as_they_are(
        self, dtype: torch.dtype, kind: int, tmp_path: Path
    ) -> None:
        model = differing.pruned("gguf_qwen2", (FFN, HEADS)).to(dtype)
        _, reader = exported(model, tmp_path)
        assert value(reader, "general.file_type") == kind
        assert_same_tensors(model, reader)

    def test_padded_for_what_quantises(self, tmp_path: Path) -> None:
        model = differing.pruned("gguf", (FFN, HEADS))
        report, reader = exported(model, tmp_path, multiple_of=32)
        assert value(reader, "deci.feed_forward_length") == [96, 64]
        assert report.fields == {FFN: ((72, 48), (96, 64)), HEADS: ((4, 2), (4, 2))}
        up = tensors(reader)["blk.1.ffn_up.weight"][1]
        assert np.array_equal(up[:48], model.model.layers[1].mlp.up_proj.weight.detach())
        assert not up[48:].any()


class TestLayersAlike:
    @pytest.mark.parametrize("name", ["gguf", "gguf_tied", "gguf_odd"])
    def test_transformers_computes_the_same_from_the_file(self, name: str, tmp_path: Path) -> None:
        model, tokenizer = layer_zoo.build(name), byte_level(bos=True)
        report, reader = exported(model, tmp_path, tokenizer)
        assert value(reader, "general.architecture") == "llama"
        assert value(reader, "llama.feed_forward_length") == model.config.intermediate_size
        assert_same_tensors(model, reader)
        assert report.fields == {}
        assert str(report).startswith("LlamaForCausalLM, gguf: all layers alike\n")
        out, file = tmp_path / "out", {"gguf_file": "model.gguf"}
        loaded = hf.AutoModelForCausalLM.from_pretrained(out, **file, dtype=torch.float32).eval()
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :40]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
        read = hf.AutoTokenizer.from_pretrained(out, **file)
        assert read(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert read.decode(read("there<tool> so")["input_ids"]) == "<start>there<tool> so"

    def test_frequencies_that_are_scaled(self, tmp_path: Path) -> None:
        """By 8 where a wave is longer than 32 tokens, not at all where it is shorter than 8."""
        model = layer_zoo.build("gguf_llama3")
        _, reader = exported(model, tmp_path)
        factors = tensors(reader)["rope_freqs.weight"][1]
        waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
        assert waves[:2] == pytest.approx([6.28, 19.87], abs=0.01)
        smooth = (32 / waves[1] - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        assert factors == pytest.approx([1, between, 8, 8, 8, 8, 8, 8], rel=1e-5)
        assert 1 < between < 8
        _, reader = exported(layer_zoo.build("gguf_linear"), tmp_path / "linear")
        assert tensors(reader)["rope_freqs.weight"][1] == pytest.approx([4.0] * 8, rel=1e-6)

    def test_a_licence_is_copied_and_files_of_the_tokenizer_are_not(self, tmp_path: Path) -> None:
        folder = saved(layer_zoo.build("gguf"), tmp_path / "model")
        (folder / "LICENSE").write_text("free")
        report = export(folder, tmp_path / "out", to="gguf")
        assert report.copied.files == ("LICENSE",)
        assert sorted(folders.content(tmp_path / "out")) == ["LICENSE", "README.md", "model.gguf"]
        assert "layers that differ" not in (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="reads byte-level BPE as another")
    def test_a_gguf_file_again(self, tmp_path: Path) -> None:
        model = layer_zoo.build("gguf")
        exported(model, tmp_path)
        report = export(tmp_path / "out" / "model.gguf", tmp_path / "again", to="gguf")
        reader = gguf.GGUFReader(tmp_path / "again" / "model.gguf")
        assert_same_tensors(model, reader)
        assert value(reader, "tokenizer.ggml.tokens")[:2] == ["<start>", "<end>"]
        assert report.copied.files == ()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gguf_gelu", r"hidden_act 'gelu': llama\.cpp's Llama computes 'silu' alone"),
            ("gguf_dynamic", r"rope_type 'dynamic': its frequencies depend on the length of the t"),
            ("gguf_yarn", r"rope_type 'yarn' scales attention by 1\.139, which a GGUF file of a "),
            ("gpt2", r"a Llama has other tensors: lm_head"),
            ("qwen3", r"a Llama has other tensors: model\.layers\.0\.self_attn\.k_norm"),
            (
                "gguf_window",
                r"sliding_window 40 can change what it computes, and a Llama has no such",
            ),
        ],
    )
    def test_what_llama_cpp_does_not_compute(self, name: str, reason: str, tmp_path: Path) -> None:
        folder = saved(layer_zoo.build(name), tmp_path / "model")
        with pytest.raises(PipelineError, match=rf"^to='gguf': this .* written so: {reason}"):
            export(folder, tmp_path / "out", to="gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_model_without_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"comes without a tokenizer, .* Save model and to"):
            export(layer_zoo.build("gguf"), tmp_path / "out", to="gguf")
        assert not list(tmp_path.iterdir())

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        layer_zoo.build("gguf").save_pretrained(tmp_path / "model")
        with pytest.raises(PipelineError, match=r"its tokenizer cannot be loaded"):
            export(tmp_path / "model", tmp_path / "out", to="gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_other_weights_and_a_multiple_where_layers_are_alike(self, tmp_path: Path) -> None:
        folder = saved(layer_zoo.build("gguf").double(), tmp_path / "model")
        with pytest.raises(PipelineError, match=r"its weights are torch\.float64, and a GGUF file"):
            export(folder, tmp_path / "out", to="gguf")
        with pytest.raises(PipelineError, match=r"multiple_of=32 pads layers that differ, and the"):
            export(folder, tmp_path / "out", to="gguf", multiple_of=32)

    def test_without_gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export_module, "find_spec", lambda name: None)
        with pytest.raises(PipelineError, match=r"^to='gguf' needs gguf: pip install 'tp-hf-confi"):
            export(tmp_path / "nothing", tmp_path / "out", to="gguf")

    def test_a_file_that_reads_back_otherwise_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = saved(layer_zoo.build("gguf"), tmp_path / "model")
        add = gguf.GGUFWriter.add_tensor

        def shifted(writer: Any, key: str, tensor: Any, **options: Any) -> None:
            add(writer, key, tensor + 1 if key == "blk.0.attn_q.weight" else tensor, **options)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", shifted)
        wrong = "read back it is another: blk.0.attn_q.weight is not what was written"
        with pytest.raises(PipelineError, match=wrong):
            export(folder, tmp_path / "out", to="gguf")
        monkeypatch.undo()
        monkeypatch.setattr(gguf_file, "_add_widths", lambda writer, llama: None)
        wrong = "read back it is another: llama.feed_forward_length is None, expected 96"
        with pytest.raises(PipelineError, match=wrong):
            export(folder, tmp_path / "out", to="gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def vocabulary(tokenizer: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is said of a tokenizer, and the notes."""
    found = vocabulary_of(tokenizer, 320)
    assert not isinstance(found, Refusal)
    return found


def types(found: dict[str, Any]) -> list[str]:
    return [kind.name for kind in found["token_types"]]


def special(found: dict[str, Any]) -> dict[str, int]:
    return {key: token for key, token in found.items() if key.endswith("_token_id")}


class TestTokenizer:
    @pytest.mark.parametrize(
        ("pre", "ignore_merges", "name"),
        [
            (BYTE_LEVEL, False, "gpt-2"),
            ([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL], False, "smollm"),
            (gguf_file._WORDS % r"\p{N}{1,3}", True, "llama-bpe"),
            (gguf_file._WORDS % r"\p{N}", False, "qwen2"),
        ],
    )
    def test_byte_level(self, pre: Any, ignore_merges: bool, name: str) -> None:
        if isinstance(pre, str):
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            pre = [pre_tokenizers.Split(Regex(pre), "isolated"), whole]
        pre = pre_tokenizers.Sequence(pre) if isinstance(pre, list) else pre
        tokenizer = byte_level(pre, ignore_merges=ignore_merges)
        tokenizer.chat_template = "{{ messages }}"
        found, notes = vocabulary(tokenizer)
        assert (found["tokenizer_model"], found["tokenizer_pre"]) == ("gpt2", name)
        size = len(tokenizer)
        assert found["token_list"][:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
        assert found["token_list"][size:] == [f"[PAD{n}]" for n in range(size, 320)]
        control = ["CONTROL"] * 3
        rest = ["NORMAL"] * (size - 4)
        assert types(found) == [*control, *rest, "USER_DEFINED", *["UNUSED"] * (320 - size)]
        assert len(found["token_merges"]) == size - 4 - 256
        assert found["token_merges"][0] in ("t h", "Ġ t", "h e", "e r")
        assert "token_scores" not in found
        assert special(found) == {"bos_token_id": 0, "eos_token_id": 1}
        ends = ("add_bos_token", "add_eos_token", "add_space_prefix")
        assert [found[end] for end in ends] == [False, False, False]
        assert found["chat_template"] == "{{ messages }}"
        assert notes == ()

    def test_what_is_put_before_and_behind(self, tmp_path: Path) -> None:
        tokenizer = byte_level(bos=True)
        tokenizer.chat_template = {"default": "{{ a }}", "tool": "{{ b }}"}
        _, reader = exported(layer_zoo.build("gguf"), tmp_path, tokenizer)
        assert value(reader, "tokenizer.ggml.add_bos_token") is True
        assert value(reader, "tokenizer.ggml.add_eos_token") is False
        assert value(reader, "tokenizer.ggml.bos_token_id") == 0
        assert value(reader, "tokenizer.ggml.eos_token_id") == 1
        assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
        assert value(reader, "tokenizer.chat_template") == "{{ a }}"
        assert value(reader, "tokenizer.chat_template.tool") == "{{ b }}"

    @pytest.mark.parametrize(
        ("pre", "normalizer", "adds_space", "exact"),
        [
            (None, LEGACY, True, True),
            (None, normalizers.Replace(" ", "▁"), False, True),
            (pre_tokenizers.Metaspace("▁", "never", split=False), None, False, True),
            (pre_tokenizers.Metaspace("▁", "first", split=False), None, True, False),
            (pre_tokenizers.Metaspace("▁", "always", split=False), None, True, False),
        ],
    )
    def test_sentencepiece(self, pre: Any, normalizer: Any, adds_space: bool, exact: bool) -> None:
        found, notes = vocabulary(sentencepiece(pre, normalizer))
        assert (found["tokenizer_model"], found["tokenizer_pre"]) == ("llama", "default")
        assert "token_merges" not in found
        assert (found["add_bos_token"], found["add_space_prefix"]) == (True, adds_space)
        assert special(found) == {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
        assert types(found)[:4] == ["CONTROL", "CONTROL", "CONTROL", "BYTE"]
        assert (types(found).count("BYTE"), types(found).count("NORMAL")) == (256, 22)
        tokens = found["token_list"]
        assert [found["token_scores"][tokens.index(piece)] for piece in PIECES] == [
            -1.0 - number for number in range(10)
        ]
        note = "llama.cpp puts a space before a text that begins with one, and after each control"
        assert [text.startswith(note) for text in notes] == [] if exact else [True]

    def test_scores_merge_as_the_merges_do(self) -> None:
        tokenizer = sentencepiece(None, LEGACY)
        found, _ = vocabulary(tokenizer)
        tokens = found["token_list"]
        scores = dict(zip(tokens, found["token_scores"], strict=True))
        chance = random.Random(0)
        for _ in range(300):
            text = "".join(chance.choices("there  ", k=chance.randint(1, 14)))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [tokens[n] for n in ids] == by_scores("▁" + text.replace(" ", "▁"), scores)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (words, "its tokenizer is of the type WordLevel, and byte-level BPE and SentencePiece"),
            (
                lambda: byte_level(
                    pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
                ),
                "its tokenizer's pre_tokenizer is none that llama.cpp has for such a tokenizer: ",
            ),
            (
                lambda: byte_level(pre_tokenizers.Whitespace()),
                "its tokenizer's pre_tokenizer is none that llama.cpp has",
            ),
            (
                lambda: byte_level(ignore_merges=True),
                "its tokenizer's pre_tokenizer is none that llama.cpp has",
            ),
            (
                lambda: byte_level(normalizer=normalizers.Lowercase()),
                "its tokenizer's normalizer is none that llama.cpp has for such a tokenizer: {\"ty",
            ),
            (
                lambda: byte_level(dropout=0.5),
                "its tokenizer's dropout is 0.5, which a GGUF file does not say",
            ),
            (
                lambda: with_token(byte_level(), AddedToken("<x>", lstrip=True)),
                "its tokenizer's token '<x>' has lstrip set, which a GGUF file does not say",
            ),
            (
                lambda: with_token(
                    sentencepiece(None, LEGACY), AddedToken("<x>", normalized=True, special=False)
                ),
                "its tokenizer looks for '<x>' after it has changed the text (normalized), llama.c",
            ),
            (
                lambda: sentencepiece(pre_tokenizers.Metaspace("▁", "first", split=True)),
                "its tokenizer's normalizer and pre_tokenizer is none that llama.cpp has",
            ),
            (
                lambda: sentencepiece(None, LEGACY, swapped=True),
                "its tokenizer's merges are not those of SentencePiece: llama.cpp merges any two",
            ),
            (
                lambda: without("eos_token"),
                "its tokenizer has no eos_token, and llama.cpp would take some other token for it",
            ),
            (
                lambda: without("bos_token"),
                "its tokenizer makes [0, 67] of [67]; llama.cpp puts bos before or eos behind",
            ),
        ],
    )
    def test_what_llama_cpp_would_cut_otherwise(self, make: Callable[[], Any], reason: str) -> None:
        found = vocabulary_of(make(), 340)
        assert isinstance(found, Refusal)
        assert found.reason.startswith(reason)

    def test_more_tokens_than_embeddings(self) -> None:
        tokenizer = byte_level()
        last = len(tokenizer) - 1
        found = vocabulary_of(tokenizer, last)
        assert isinstance(found, Refusal)
        assert found.reason == (
            f"its tokenizer has tokens up to {last}, and the model {last} embeddings"
        )

    def test_composed_characters_are_noted(self) -> None:
        _, notes = vocabulary(byte_level(normalizer=normalizers.NFC()))
        assert notes == (
            "the tokenizer composes characters first (NFC), which llama.cpp does not: text with "
            "combining accents is cut otherwise there",
        )


def with_token(tokenizer: Any, token: AddedToken) -> Any:
    tokenizer.add_tokens([token])
    return tokenizer


def without(name: str) -> Any:
    tokenizer = byte_level(bos=True)
    setattr(tokenizer, name, None)
    return tokenizer


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's merging: the pair with the best score first, of equals the first."""
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


class TestCommand:
    def test_it_writes_a_file_and_replaces_it(self, capsys: Any, tmp_path: Path) -> None:
        folder, out = saved(layer_zoo.build("gguf"), tmp_path / "model"), tmp_path / "out"
        typed = ("export", folder, "--to", "gguf", "--out", out)
        code, printed, errors = shell(capsys, *typed)
        assert code == 0, errors
        assert "LlamaForCausalLM, gguf: all layers alike" in printed
        assert shell(capsys, *typed)[0] == 2
        code, printed, errors = shell(capsys, *typed, "--overwrite", "--json")
        assert code == 0, errors
        assert json.loads(printed)["loading"] == "llama-cli --model model.gguf"
        assert value(gguf.GGUFReader(out / "model.gguf"), "general.name") == "model"
