"""What a job runs its model on: which windows, of which text, for which purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tp_hf_config.calibration.batches import second_text, shipped_text
from tp_hf_config.errors import UnsupportedModelError
from tp_hf_config.pipeline import prune, text
from tp_hf_config.pipeline.companions import Copied
from tp_hf_config.pipeline.job import HELD_OUT, SECOND_TEXT, Job, Pruned
from tp_hf_config.pipeline.proofs import Proof
from tp_hf_config.pipeline.prune import _seeded
from tp_hf_config.pipeline.source import Source
from tp_hf_config.pipeline.text import (
    Choice,
    Material,
    batch_of,
    gather,
    perplexity,
)
from tp_hf_config.planning.plan import Plan, Size
from tp_hf_config.planning.settings import PruneSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
LETTERS = [chr(number) for number in range(32, 127)]  # 95 of the tiny models' 99 tokens
SIZE = 62  # tokens of a window: the tiny models have 64 positions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for every letter, so that windows can be read again."""
    vocab = {letter: number for number, letter in enumerate([*LETTERS, "\0"])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="\0"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="\0")


def job(**settings: Any) -> Job:
    return Job(Source("model", "model"), Path("out"), {}, **settings)


def gathered(model: Any, choice: Choice, **settings: Any) -> tuple[Material, list[str]]:
    said: list[str] = []
    with patch.object(text, "show", lambda what: said.append(str(what))):
        material = gather(job(**settings), choice, model)
    return material, said


def read(tokenizer: Any, windows: Iterable[torch.Tensor]) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(row.flatten())) for row in windows]


def windows_in(text: str) -> list[str]:
    plain = "".join(letter if letter in LETTERS else "\0" for letter in text)
    return [plain[i : i + SIZE] for i in range(0, len(plain) // SIZE * SIZE, SIZE)]


class TestShippedText:
    def test_the_last_32_passages_and_the_others(self) -> None:
        path = Path(prune.__file__).parents[1] / "calibration" / "shipped_text.txt"
        whole = path.read_text(encoding="utf-8")
        passages = [one.strip("\n") for one in whole.split("\n----\n")]
        assert len(passages) == 132
        assert shipped_text() == "\n\n".join(passages[:100])
        assert second_text() == "\n\n".join(passages[100:])
        assert not {"----"} & {*shipped_text().splitlines(), *second_text().splitlines()}

    def test_it_is_calibrated_on_and_the_second_is_asked_about(self, tokenizer: Any) -> None:
        model = tiny.build("llama-gqa")
        choice = Choice("wanda", "shipped", shipped_text(), tokenizer, refit=True, writes=True)
        material, said = gathered(model, choice)
        calibration = material.calibration
        assert calibration is not None
        ours, second = windows_in(shipped_text()), windows_in(second_text())
        seen = read(
            tokenizer, (b["input_ids"] for b in (*calibration.train, *calibration.held_out))
        )
        assert (len(calibration.train), len(calibration.held_out)) == (220, 6)
        assert len(seen) == len(set(seen)) == 198 * 8 // 7
        assert set(seen) <= set(ours)
        asked = read(tokenizer, material.second)
        assert len(asked) == len(second) - len(second) // 8 + 6
        assert set(asked) <= set(second)
        assert material.held_out.shape == (0, SIZE)
        assert said == [f"calibrating: {len(seen)} windows", str(calibration)]


class TestWindows:
    text = " ".join(f"word {number} of many" for number in range(400))

    def test_a_file_keeps_windows_that_decide_nothing(self, tokenizer: Any) -> None:
        model = tiny.build("llama-gqa")
        choice = Choice("wanda", "file", self.text, tokenizer, refit=True, writes=True)
        material, _ = gathered(model, choice)
        assert material.calibration is not None
        held_out = set(read(tokenizer, material.held_out))
        assert len(held_out) == 6
        calibrated = (*material.calibration.train, *material.calibration.held_out)
        assert not held_out & set(read(tokenizer, (batch["input_ids"] for batch in calibrated)))
        drawn = [next(material.batches) for _ in range(300)]
        assert not held_out & set(read(tokenizer, drawn))
        second = {*windows_in(second_text())}
        assert set(read(tokenizer, material.second)) <= second
        assert material.perplexities(model) == {
            HELD_OUT: perplexity(model, material.held_out),
            SECOND_TEXT: perplexity(model, material.second),
        }

    def test_own(self) -> None:
        """It needs no tokenizer; then there is no second text."""
        model = tiny.build("llama-gqa")
        own = Choice("curvature", "own", refit=True, writes=True)
        one, said = gathered(model, own, seed=3, tokens=620)
        other, _ = gathered(model, own, seed=3, tokens=620)
        assert one.calibration is not None
        assert other.calibration is not None
        assert one.calibration.train[0]["input_ids"].shape == (1, SIZE)
        for mine, same in zip(one.calibration.train, other.calibration.train, strict=True):
            assert torch.equal(mine["input_ids"], same["input_ids"])
        assert said[0] == "the model writes the text that it is calibrated on"
        assert one.perplexities(model) == {}

    def test_what_is_not_needed_is_not_made(self, tokenizer: Any) -> None:
        model = tiny.build("llama-gqa")
        random = Choice("random", "file", self.text, tokenizer, writes=True)
        material, said = gathered(model, random)
        assert (material.calibration, material.teacher, said) == (None, None, [])
        material, _ = gathered(model, random, recover=2)
        assert material.teacher is not None
        assert material.teacher is not model

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("t5", {"input_ids": (1, 128), "decoder_input_ids": (1, 128)}),
            ("roberta", {"input_ids": (1, SIZE)}),
            ("bert-cls", {"input_ids": (1, SIZE)}),
            ("bert", {"input_ids": (1, SIZE)}),
        ],
    )
    def test_other_models_of_text(
        self, tokenizer: Any, name: str, arguments: dict[str, tuple[int, int]]
    ) -> None:
        """They are calibrated on the file, and have no perplexity."""
        model = tiny.build(name)
        material, _ = gathered(model, Choice("wanda", "file", self.text, tokenizer), tokens=620)
        assert material.calibration is not None
        (batch, *_) = material.calibration.train
        assert {key: tuple(value.shape) for key, value in batch.items()} == arguments
        assert material.perplexities(model) == {}

    def test_no_logits_where_they_are_needed(self, tokenizer: Any) -> None:
        choice = Choice("wanda", "file", self.text, tokenizer)
        message = "^BertModel has no logits to recover: leave --recover out$"
        with pytest.raises(UnsupportedModelError, match=message):
            gather(job(recover=2), choice, tiny.build("bert"))


class TestBatches:
    def test_an_encoder_taken_out_of_an_encoder_decoder(self) -> None:
        """Its config says that there is a decoder."""
        ids = torch.arange(10)[None]
        model = tiny.build("t5")
        assert set(batch_of(model, ids)) == {"input_ids", "decoder_input_ids"}
        encoder = model.encoder
        encoder.config.is_encoder_decoder = True
        assert set(batch_of(encoder, ids)) == {"input_ids"}

    def test_a_model_that_wants_more_than_text(
        self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny.build("llama-gqa")

        def forward(input_ids: Any = None, pixel_values: Any = None) -> None:
            raise ValueError("no\nimage")

        monkeypatch.setattr(model, "forward", forward)
        with pytest.raises(UnsupportedModelError) as refused:
            gather(job(), Choice("wanda", "file", "a text " * 99, tokenizer), model)
        assert str(refused.value) == (
            "LlamaForCausalLM cannot be run on text alone (ValueError: no image). Leave "
            "--calibration, --recover, --allocate and --drop-layers out, and use --importance "
            "magnitude or random with --no-refit"
        )


def test_a_class_without_embeddings_of_tokens(tokenizer: Any) -> None:
    config = transformers.CanineConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.CanineForTokenClassification(config)
    start = r"^CanineForTokenClassification cannot be run on text alone \(NotImplementedError"
    with pytest.raises(UnsupportedModelError, match=start):
        gather(job(), Choice("wanda", "file", "a text " * 99, tokenizer), model)


def test_a_class_that_says_it_has_fewer_than_no_positions(tokenizer: Any) -> None:
    """XLNet says -1, and has as many as one likes."""
    sizes = {"d_model": 8, "n_head": 2, "d_inner": 8, "n_layer": 1, "vocab_size": 99}
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
    assert model.config.max_position_embeddings == -1
    choice = Choice("wanda", "file", "a text " * 99, tokenizer, writes=True)
    material = gather(job(), choice, model)
    assert material.held_out.shape == (1, 256)


def test_the_result_says_which_text_is_which() -> None:
    size = Size(1, 2, None, None)
    plan = Plan("Model", PruneSettings(), (), {}, size, size, None)

    def lines(perplexity: dict[str, tuple[float, float]]) -> list[str]:
        result = Pruned("Model", Path("o"), plan, (), (2, 1), Proof(1, 1), Copied(()))
        return str(replace(result, perplexity=perplexity)).splitlines()

    held_out = "perplexity on held-out text of the calibration file: 1.5 -> 2.5"
    second = "perplexity on a second text, not used for calibration: 3.0 -> 4.2"
    parameters = "parameters: 2 -> 1 (50.0%)"
    both = lines({HELD_OUT: (1.5, 2.5), SECOND_TEXT: (3, 4.21)})
    assert both[1:4] == [parameters, held_out, second]
    assert lines({SECOND_TEXT: (3, 4.21)})[1:3] == [parameters, second]
    assert [line for line in lines({}) if "perplexity" in line] == []
    result = Pruned("Model", Path("o"), plan, (), (2, 1), Proof(1, 1), Copied(()))
    data = replace(result, perplexity={HELD_OUT: (3, 4)}).to_dict()
    assert data["perplexity"] == {HELD_OUT: {"before": 3, "after": 4}}


def test_a_seed_is_that_of_a_job_and_of_no_device_that_it_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    with _seeded(3):
        drawn = torch.rand(2)
    assert drawn.equal(torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert torch.random.get_rng_state().equal(before)
    assert seeded == []
