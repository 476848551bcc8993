"""How channels are ranked, and which text the model is run on, by its class and the arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import tiny
import transformers as hf

from tp_hf_config.calibration.batches import shipped_text
from tp_hf_config.errors import CalibrationWarning, PipelineError, UnsupportedModelError
from tp_hf_config.pipeline.job import Job
from tp_hf_config.pipeline.source import find_source
from tp_hf_config.pipeline.text import Choice, choose, class_writes_text

FILE = Path("there/text.txt")
TEXTS = {None: None, "own": None, FILE: "w1 w2"}
_ADD = (
    "Add --calibration FILE (plain text: a few thousand words of the kind that the model reads)",
    ", or use --importance magnitude",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama-gqa", "bert", "roberta", "t5", "vit"):
        folders.save(name, root / name)
    tiny.build("llama-gqa").save_pretrained(root / "no-tokenizer")
    return root


def job_of(folder: Path, **settings: Any) -> Job:
    return Job(find_source(str(folder)), folder.with_name("out"), {}, **settings)


def chosen(folder: Path, **settings: Any) -> Choice:
    config = hf.AutoConfig.from_pretrained(folder)
    job = job_of(folder, **settings)
    model_class = getattr(hf, config.architectures[0])
    return choose(job, TEXTS[job.calibration], config, model_class)


class TestChosen:
    @pytest.mark.filterwarnings("ignore:--importance magnitude ranks")
    @pytest.mark.parametrize(
        ("name", "settings", "importance", "origin", "refit"),
        [
            ("llama-gqa", {}, "auto", "shipped", True),
            ("llama-gqa", {"refit": False}, "auto", "shipped", False),
            ("llama-gqa", {"importance": "magnitude"}, "magnitude", "shipped", True),
            ("llama-gqa", {"importance": "random"}, "random", "shipped", True),
            ("llama-gqa", {"importance": "curvature"}, "curvature", "shipped", True),
            ("llama-gqa", {"recover": 3}, "auto", "shipped", True),
            ("llama-gqa", {"drop_layers": 1}, "auto", "shipped", True),
            ("llama-gqa", {"calibration": "own"}, "auto", "own", True),
            ("llama-gqa", {"calibration": FILE}, "auto", "file", True),
            (
                "llama-gqa",
                {"importance": "magnitude", "refit": False},
                "magnitude",
                None,
                False,
            ),
            (
                "llama-gqa",
                {"importance": "magnitude", "refit": False, "calibration": FILE},
                "magnitude",
                "file",
                False,
            ),
            ("no-tokenizer", {"calibration": "own"}, "auto", "own", True),
            ("bert", {}, "magnitude", None, False),
            ("bert", {"calibration": FILE}, "auto", "file", True),
            ("roberta", {"importance": "random"}, "random", None, False),
            (
                "roberta",
                {"calibration": FILE, "importance": "activation"},
                "activation",
                "file",
                True,
            ),
            ("t5", {}, "magnitude", None, False),
            ("t5", {"calibration": FILE, "recover": 2}, "auto", "file", True),
            ("vit", {}, "magnitude", None, False),
            ("vit", {"importance": "random"}, "random", None, False),
        ],
    )
    def test_by_class_and_arguments(
        self,
        models: Path,
        name: str,
        settings: dict[str, Any],
        importance: str,
        origin: str | None,
        refit: bool,
    ) -> None:
        found = chosen(models / name, **settings)
        assert (found.importance, found.origin, found.refit) == (importance, origin, refit)
        text = {"shipped": shipped_text(), "file": "w1 w2"}.get(str(origin), "")
        assert found.text == text
        assert (found.tokenizer is None) == (origin is None or name == "no-tokenizer")

    @pytest.mark.filterwarnings("ignore:--importance magnitude ranks")
    @pytest.mark.parametrize(
        ("settings", "measures"),
        [
            ({}, True),
            ({"refit": False}, True),
            ({"importance": "magnitude", "refit": False}, False),
            ({"importance": "magnitude"}, True),
        ],
    )
    def test_whether_it_is_calibrated(
        self, models: Path, settings: dict[str, Any], measures: bool
    ) -> None:
        assert chosen(models / "llama-gqa", **settings).measures is measures

    def test_a_language_model_that_is_ranked_by_magnitude_and_cut(self, models: Path) -> None:
        message = (
            "--importance magnitude ranks LlamaForCausalLM by the size of its weights, which often "
            "removes what a language model needs most. Leave --importance out, or at least "
            "--no-refit"
        )
        with pytest.warns(CalibrationWarning) as warned:
            chosen(models / "llama-gqa", importance="magnitude", refit=False)
        assert [str(one.message) for one in warned] == [message]

    def test_a_language_model_without_a_tokenizer(self, models: Path) -> None:
        """It is not ranked by magnitude unasked."""
        with pytest.raises(PipelineError) as refused:
            chosen(models / "no-tokenizer")
        assert "no-tokenizer: its tokenizer cannot be loaded: " in str(refused.value)
        assert str(refused.value).endswith(
            ". To prune without a text, use --importance magnitude or random with --no-refit"
        )
        found = chosen(models / "no-tokenizer", importance="random", refit=False)
        assert (found.importance, found.origin, found.measures) == ("random", None, False)


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            (
                "bert",
                {"importance": "wanda"},
                "--importance wanda needs text to run BertModel on (the shipped text is only for "
                f"causal language models). {''.join(_ADD)}",
            ),
            (
                "roberta",
                {"recover": 2},
                "--recover needs text to run RobertaForMaskedLM on (the shipped text is only for "
                f"causal language models). {_ADD[0]}",
            ),
            (
                "bert",
                {"allocate": True},
                "--allocate needs text to run BertModel on (the shipped text is only for causal "
                f"language models). {_ADD[0]}",
            ),
            (
                "bert",
                {"drop_layers": 1},
                "--drop-layers needs text to run BertModel on (the shipped text is only for causal "
                f"language models). {_ADD[0]}",
            ),
            (
                "t5",
                {"calibration": "own"},
                "--calibration own: T5ForConditionalGeneration is not a causal language model and "
                "cannot write text. Use --calibration FILE (plain text: a few thousand words of "
                "the kind that the model reads)",
            ),
        ],
    )
    def test_no_text(self, models: Path, name: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(PipelineError) as refused:
            chosen(models / name, **settings)
        assert str(refused.value) == message

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"calibration": FILE}, "--calibration"),
            ({"calibration": "own"}, "--calibration"),
            ({"importance": "activation"}, "--importance activation"),
            ({"recover": 1, "calibration": FILE}, "--recover"),
            ({"drop_layers": 1}, "--drop-layers"),
            ({"allocate": True}, "--allocate"),
        ],
    )
    def test_a_model_of_images(self, models: Path, settings: dict[str, Any], what: str) -> None:
        with pytest.raises(UnsupportedModelError) as refused:
            chosen(models / "vit", **settings)
        assert str(refused.value) == (
            f"ViTForImageClassification takes no text, so {what} cannot be used. Leave "
            "--calibration, --recover, --allocate and --drop-layers out, and use --importance "
            "magnitude or random with --no-refit (in Python: the hook, drop_layers and allocate "
            "take tp_hf_config.calibrate(model, batches))"
        )

    def test_an_importance_that_tells_nothing_of_layers(self, models: Path) -> None:
        with pytest.raises(PipelineError) as refused:
            chosen(models / "llama-gqa", allocate=True, importance="random")
        assert str(refused.value) == (
            "--allocate needs an importance that is measured by calibration, and --importance "
            "random is not: leave it out, or use one of auto, wanda, activation, curvature"
        )

    @pytest.mark.parametrize("settings", [{"importance": "wanda"}, {"calibration": FILE}])
    def test_no_tokenizer_where_a_text_is_asked_for(
        self, models: Path, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(PipelineError, match="no-tokenizer: its tokenizer cannot be loaded: "):
            chosen(models / "no-tokenizer", **settings)


@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("LlamaForCausalLM", True),
        ("MambaForCausalLM", True),
        ("LlamaModel", False),
        ("LlamaForSequenceClassification", False),
        ("BertForMaskedLM", False),
        ("T5ForConditionalGeneration", False),
        ("WhisperForConditionalGeneration", False),
        ("ViTForImageClassification", False),
    ],
)
def test_which_classes_are_causal_language_models(name: str, writes: bool) -> None:
    model_class = getattr(hf, name)
    assert class_writes_text(model_class, model_class.config_class()) is writes


def test_the_settings_of_the_card(models: Path) -> None:
    """What was done, in the order of the arguments, and nothing that was not set."""
    plain = {"device": "cpu", "seed": 0}

    def settings(name: str, **given: Any) -> dict[str, Any]:
        return chosen(models / name, **given).settings(job_of(models / name, **given))

    def done(importance: str, calibration: str, refit: bool = True) -> dict[str, Any]:
        own = {"importance": importance, "calibration": calibration, "refit": refit}
        return own | plain

    assert settings("llama-gqa") == done("auto", "shipped text")
    assert settings("llama-gqa", calibration="own") == done("auto", "own")
    assert settings("bert", calibration=FILE) == done("auto", "text.txt")
    assert settings("llama-gqa", refit=False) == done("auto", "shipped text", False)
    assert settings("vit") == {"importance": "magnitude", **plain}
    assert settings("llama-gqa", drop_layers=2, drop_from="model.layers") == {
        "drop_layers": "model.layers=2",
        "calibration": "shipped text",
        "refit": True,
        **plain,
    }
    recovered = settings("llama-gqa", recover=4, dtype="bfloat16", command="typed")
    assert list(recovered) == [
        "importance",
        "calibration",
        "refit",
        "recover",
        "device",
        "dtype",
        "seed",
        "command",
    ]
