"""Models whose layers differ, in forms that stock classes and other engines load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import differing
import layer_zoo
import model_folders as folders
import pytest
import tiny
import torch
import transformers as hf
import zoo
from masked_original import eager
from shell import shell

from tp_hf_config import PipelineError, export, verify_checkpoint
from tp_hf_config.checkpoint import loading
from tp_hf_config.pipeline import padding as padding_module
from tp_hf_config.pipeline import source

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
    ),
]
WITHIN = 1e-5
"""How far outputs in float32 may differ: sums over other numbers of terms."""
_EIGHT: dict[str, Any] = {
    **zoo._GQA,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}
layer_zoo._MORE.update(
    {
        "llama_8": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**_EIGHT)),
        "qwen2_8": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_EIGHT)),
        "phi3_8": lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**_EIGHT)),
    }
)
FFN_AND_HEADS = ("intermediate_size", "num_attention_heads")
# class, fields, shares that first and other layers lose -> the padded config's values
PADDED: list[tuple[str, tuple[str, ...], float, float, dict[str, int]]] = [
    ("llama", FFN_AND_HEADS, 0.25, 0.5, {"intermediate_size": 72, "num_attention_heads": 4}),
    ("qwen2", FFN_AND_HEADS, 0.25, 0.5, {"intermediate_size": 72, "num_attention_heads": 4}),
    ("gemma2", FFN_AND_HEADS, 0.25, 0.5, {"intermediate_size": 72, "num_attention_heads": 4}),
    ("phi3", FFN_AND_HEADS, 0.5, 0.25, {"intermediate_size": 72, "num_attention_heads": 4}),
    ("gpt2", ("n_inner",), 0.25, 0.5, {"n_inner": 72}),
    ("mixtral", ("intermediate_size",), 0.25, 0.5, {"intermediate_size": 72}),
    ("bert", ("intermediate_size",), 0.5, 0.25, {"intermediate_size": 72}),
    ("vit", FFN_AND_HEADS, 0.25, 0.5, {"intermediate_size": 72, "num_attention_heads": 3}),
    ("t5", ("d_ff",), 0.25, 0.5, {"d_ff": 72}),
    ("whisper", ("encoder_ffn_dim",), 0.25, 0.5, {"encoder_ffn_dim": 72, "decoder_ffn_dim": 80}),
    ("dinov2", ("mlp_ratio",), 0.25, 0.5, {"mlp_ratio": 3}),
    # key/value groups, with the query heads of each
    ("qwen2_8", ("num_key_value_heads",), 0.5, 0.25, {"num_key_value_heads": 3}),
    ("llama_8", ("num_key_value_heads",), 0.1, 0.5, {"num_attention_heads": 8}),
    ("phi3_8", ("num_key_value_heads",), 0.5, 0.25, {"num_attention_heads": 6}),
    ("phi3", ("num_key_value_heads",), 0.1, 0.5, {"num_key_value_heads": 2}),  # a single one
    # a layer with one query head for each key/value head, among layers with two
    ("llama_8", ("num_attention_heads",), 0.5, 0.1, {"num_attention_heads": 8}),
    ("phi3_8", ("num_attention_heads",), 0.5, 0.1, {"num_attention_heads": 8}),
]

IN_MAKE_TEST = ("qwen2", "gpt2", "mixtral", "whisper", "phi3_8")


@pytest.fixture
def without_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process finds is another test's."""
    monkeypatch.setattr(padding_module, "prove_roundtrip", lambda *_: None)


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same_outputs(model: Any, other: Any, within: float = WITHIN) -> None:
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in zoo.inputs(model).items()
    }
    expected, found = outputs(model, inputs), outputs(other, inputs)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert (value - found[key]).norm() <= within * value.norm(), key


class TestPadded:
    @pytest.mark.usefixtures("without_fresh_process")
    @pytest.mark.parametrize(
        ("name", "fields", "first", "others", "values"),
        [
            pytest.param(
                name,
                fields,
                *shares,
                id=f"{name}-{'-'.join(fields)}-{shares[0]}",
                marks=() if name in IN_MAKE_TEST else pytest.mark.full,
            )
            for name, fields, *shares in PADDED
        ],
    )
    def test_the_stock_class_computes_the_same(
        self,
        name: str,
        fields: tuple[str, ...],
        first: float,
        others: float,
        values: dict[str, int],
        tmp_path: Path,
    ) -> None:
        model = differing.pruned(name, fields, first, others)
        before = copy.deepcopy(model.state_dict())
        report = export(model, tmp_path / "out", to="padded")
        stock = type(layer_zoo.build(name))
        loaded, info = stock.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        assert {field: getattr(loaded.config, field) for field in values} == values
        assert not loaded.config.is_heterogeneous
        assert not list((tmp_path / "out").glob("*.py"))
        assert_same_outputs(model, loaded)
        wide = eager(copy.deepcopy(loaded))
        assert_same_outputs(eager(copy.deepcopy(model)), wide, 1e-6)  # norms compute in float32
        assert set(report.fields) >= set(fields)
        assert report.proof.difference <= 1e-9
        assert report.parameters == (model.num_parameters(), loaded.num_parameters())
        assert type(model).__name__.startswith("Layerwise")
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    @pytest.mark.usefixtures("without_fresh_process")
    def test_weights_stand_where_their_units_do_and_the_rest_is_zero(self, tmp_path: Path) -> None:
        """Query heads: two for each of two key/value heads, where a layer has one."""
        model = differing.pruned("llama", FFN_AND_HEADS, 0.25, 0.5)
        export(model, tmp_path / "out", to="padded")
        loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        old, new = model.model.layers[1], loaded.model.layers[1]
        dim = model.config.head_dim
        queries = new.self_attn.q_proj.weight.unflatten(0, (2, 2, dim))
        assert torch.equal(queries[:, 0], old.self_attn.q_proj.weight.unflatten(0, (2, dim)))
        assert not queries[:, 1].any()
        read = new.self_attn.o_proj.weight.unflatten(1, (2, 2, dim))
        assert torch.equal(read[:, :, 0], old.self_attn.o_proj.weight.unflatten(1, (2, dim)))
        assert not read[:, :, 1].any()
        width = old.mlp.up_proj.out_features
        for key in ("gate_proj", "up_proj"):
            weight = getattr(new.mlp, key).weight
            assert torch.equal(weight[:width], getattr(old.mlp, key).weight)
            assert not weight[width:].any()
        assert torch.equal(new.mlp.down_proj.weight[:, :width], old.mlp.down_proj.weight)
        assert not new.mlp.down_proj.weight[:, width:].any()
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    def test_a_folder_with_its_tokenizer_and_the_same_tokens(self, tmp_path: Path) -> None:
        folder = saved("llama", tmp_path)
        model = differing.pruned("llama", FFN_AND_HEADS)
        report = export(folder, tmp_path / "out", to="padded", trust_remote_code=True)
        assert report.copied.files == ("tokenizer.json", "tokenizer_config.json")
        assert verify_checkpoint(tmp_path / "out").same
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(loaded) is hf.LlamaForCausalLM
        ids = zoo.inputs(model)["input_ids"]
        settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
        assert torch.equal(model.generate(ids, **settings), loaded.generate(ids, **settings))
        assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w5")["input_ids"] == [3, 5]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| intermediate_size | 48..72 | 72 |" in card
        assert "Load it with `AutoModelForCausalLM.from_pretrained(folder)`" in card

    @pytest.mark.usefixtures("without_fresh_process")
    def test_code_of_the_tokenizer_goes_along_and_that_of_the_class_does_not(
        self, tmp_path: Path
    ) -> None:
        folder = saved("llama", tmp_path)
        (code,) = (path.name for path in folder.glob("*.py"))
        (folder / "tokenization_own.py").write_text("")
        report = export(folder, tmp_path / "out", to="padded", trust_remote_code=True)
        assert "tokenization_own.py" in report.copied.files
        assert report.copied.not_copied == (code,)
        assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["tokenization_own.py"]

    def test_what_a_fresh_process_cannot_load_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = padding_module.save_model

        def broken(model: Any, folder: Path) -> None:
            save(model, folder)
            config = json.loads((folder / "config.json").read_text())
            config["rms_norm_eps"] = 0.5
            (folder / "config.json").write_text(json.dumps(config))

        monkeypatch.setattr(padding_module, "save_model", broken)
        model = differing.pruned("llama", ("intermediate_size",))
        with pytest.raises(
            PipelineError, match="the model was not written, because its round trip could not"
        ):
            export(model, tmp_path / "out", to="padded")
        assert not list(tmp_path.iterdir())


class TestMultiples:
    """Any model, with inner widths that a tool takes."""

    @pytest.mark.usefixtures("without_fresh_process")
    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("llama", {"intermediate_size": 128}),
            ("gpt2", {"n_inner": 128}),
            ("mixtral", {"intermediate_size": 128}),
            ("bert", {"intermediate_size": 128}),
            ("t5", {"d_ff": 128}),
            ("vit", {"intermediate_size": 128}),
        ],
    )
    def test_a_uniform_model(self, name: str, values: dict[str, int], tmp_path: Path) -> None:
        model = layer_zoo.build(name)
        before = model.num_parameters()
        report = export(model, tmp_path / "out", to="padded", multiple_of=64)
        loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        assert {field: getattr(loaded.config, field) for field in values} == values
        assert_same_outputs(eager(copy.deepcopy(model)), eager(loaded))
        assert report.proof.difference <= 1e-9
        assert report.parameters == (before, loaded.num_parameters())
        assert loaded.num_parameters() > before

    @pytest.mark.usefixtures("without_fresh_process")
    def test_layers_that_differ(self, tmp_path: Path) -> None:
        model = differing.pruned("llama", ("intermediate_size",), 0.25, 0.5)
        export(model, tmp_path / "out", to="padded", multiple_of=64)
        loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.intermediate_size == 128
        assert_same_outputs(model, loaded)

    @pytest.mark.usefixtures("without_fresh_process")
    def test_a_folder_larger_than_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its weights are mapped, and a tiny model of the class is compared: no copy in float64."""
        folder = tmp_path / "model"
        layer_zoo.build("llama").save_pretrained(folder)
        monkeypatch.setattr(source, "free_memory", lambda: 1)
        compared: list[int] = []
        in_float64 = padding_module.in_float64

        def noted(model: Any, recipe: Any) -> Any:
            compared.append(model.num_parameters())
            return in_float64(model, recipe)

        monkeypatch.setattr(padding_module, "in_float64", noted)
        report = export(folder, tmp_path / "out", to="padded", multiple_of=64)
        assert report.widths == {"intermediate_size": ("96", "128")}
        stored = hf.LlamaForCausalLM.from_pretrained(folder)
        assert compared
        assert all(number < stored.num_parameters() for number in compared)
        assert_same_outputs(stored, hf.LlamaForCausalLM.from_pretrained(tmp_path / "out"))

    @pytest.mark.usefixtures("without_fresh_process")
    def test_layers_that_differ_in_a_folder_larger_than_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are compared themselves: a tiny model does not have their widths."""
        model = differing.pruned("llama", FFN_AND_HEADS, 0.25, 0.5)
        model.save_pretrained(tmp_path / "model")
        monkeypatch.setattr(source, "free_memory", lambda: 1)
        report = export(
            tmp_path / "model",
            tmp_path / "out",
            to="padded",
            multiple_of=64,
            trust_remote_code=True,
        )
        assert report.proof.difference <= 1e-9
        loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.intermediate_size == 128
        assert_same_outputs(model, loaded)

    def test_mistakes(self, tmp_path: Path, capsys: Any) -> None:
        model = layer_zoo.build("llama")
        with pytest.raises(PipelineError, match="intermediate_size 96 is a multiple of 32 already"):
            export(model, tmp_path / "out", to="padded", multiple_of=32)
        with pytest.raises(PipelineError, match="multiple_of=64 is for to='padded'"):
            export(model, tmp_path / "out", to="decilm", multiple_of=64)
        model.save_pretrained(tmp_path / "model")
        typed = ("export", tmp_path / "model", "--to", "padded", "--out", tmp_path / "out")
        code, out, _ = shell(capsys, *typed, "--multiple-of", 64)
        assert code == 0
        assert "intermediate_size" in out


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "fields", "reason"),
        [
            ("mixtral", ("num_local_experts",), "zeros are not neutral in num_local_experts: "),
            ("gpt_oss", ("num_local_experts",), "zeros are not neutral in num_local_experts: "),
            ("olmo2", ("num_attention_heads",), "zeros are not neutral in num_attention_heads: "),
            ("deepseek_v3", ("q_lora_rank",), "zeros are not neutral in q_lora_rank: "),
        ],
    )
    def test_where_zeros_are_not_neutral(
        self, name: str, fields: tuple[str, ...], reason: str, tmp_path: Path
    ) -> None:
        model = differing.pruned(name, fields)
        with pytest.raises(PipelineError, match=f"cannot be written so: {reason}the other units"):
            export(model, tmp_path / "out", to="padded")
        assert not list(tmp_path.iterdir())

    def test_a_stock_class(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match="this LlamaForCausalLM is of a stock class alrea"):
            export(layer_zoo.build("llama"), tmp_path / "out", to="padded")
        assert not list(tmp_path.iterdir())

    def test_rotary_embeddings_that_transformers_4_would_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = folders.save("llama-gqa", tmp_path / "model")
        data = json.loads((folder / "config.json").read_text())
        data.pop("rope_theta", None)
        data["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
        (folder / "config.json").write_text(json.dumps(data))
        monkeypatch.setattr(loading, "MAJOR", 4)
        with pytest.raises(PipelineError, match="Transformers 5 wrote rope_theta into rope_param"):
            export(folder, tmp_path / "out", to="padded")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("to", ["padded", "decilm"])
    def test_a_generation_config_that_is_not_saved(self, to: Any, tmp_path: Path) -> None:
        """It is said before the proof."""
        model = differing.pruned("llama", ("intermediate_size",))
        model.generation_config.temperature = 0.9
        with pytest.raises(PipelineError, match=r"its generation config\. Correct .*`temp"):
            export(model, tmp_path / "out", to=to)
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_not_empty_stays(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(PipelineError, match=r"is not empty\. Choose another folder"):
            export(layer_zoo.build("llama"), tmp_path, to="padded")
        assert folders.content(tmp_path) == {"mine": b"mine"}


def saved(name: str, root: Path) -> Path:
    """A folder with a model whose layers differ, and its tokenizer."""
    folder = root / name
    differing.pruned(name, FFN_AND_HEADS).save_pretrained(folder)
    folders.save_tokenizer(folder)
    return folder


class TestCommand:
    def test_it_writes_a_folder(self, capsys: Any, tmp_path: Path) -> None:
        folder, out = saved("llama", tmp_path), tmp_path / "out"
        typed = ("export", folder, "--to", "padded", "--out", out, "--json")
        code, printed, errors = shell(capsys, *typed, "--trust-remote-code")
        found = json.loads(printed)
        assert code == 0, errors
        assert found["fields"] == {
            "intermediate_size": {"old": [72, 48], "new": [72, 72]},
            "num_attention_heads": {"old": [4, 2], "new": [4, 4]},
        }
        assert found["copied"]["files"] == ["tokenizer.json", "tokenizer_config.json"]
        assert sorted(folders.content(out)) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]

    def test_code_that_is_not_trusted_does_not_run(self, capsys: Any, tmp_path: Path) -> None:
        folder = saved("llama", tmp_path)
        before = folders.content(tmp_path)
        typed = ("export", folder, "--to", "padded", "--out", tmp_path / "out")
        code, printed, errors = shell(capsys, *typed)
        assert (code, printed) == (1, "")
        assert "is code that comes with the model, which is not run by default. Read its" in errors
        assert folders.content(tmp_path) == before

    def test_wrong_usage_is_said_before_anything_is_loaded(
        self, capsys: Any, tmp_path: Path
    ) -> None:
        folder = tiny.build("llama-gqa").save_pretrained(tmp_path / "a") or tmp_path / "a"
        typed = ("export", folder, "--to", "padded", "--out", tmp_path)
        code, _, errors = shell(capsys, *typed)
        assert code == 2
        assert "is not empty" in errors
        assert shell(capsys, "export", tmp_path / "b", "--to", "padded", "--out", "c")[0] == 2
        assert shell(capsys, "export", folder, "--to", "onnx", "--out", "c")[0] == 2
