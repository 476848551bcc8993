"""What stands beside the model and says what its config says: followed where proved, else told."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook, pruner_kwargs
from tp_hf_config.pipeline.companions import Copied, notes_on_uncopied
from tp_hf_config.pipeline.source import find_source


def step(model: nn.Module, *fields: str) -> Any:
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=fields),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    pruner.step()
    return hook.last_report


def outside(name: str, kind: str, old: int, new: int, field: str = "hidden_size") -> str:
    return (
        f"{name} ({kind}) is still {old}, as {field} was: it stands outside the model, and nothing "
        f"proves that it means the same. Set it to {new} if it does"
    )


# Modules around the model


class Encoder(nn.Module):
    """Holds a model and says how wide it is, by its config."""

    def __init__(self, body: Any):
        super().__init__()
        self.body, self.longest = body, body.config.hidden_size

    def get_width(self) -> int:
        return self.body.config.hidden_size


class Pool(nn.Module):
    """Says how wide the encoder is, by a number of its own."""

    def __init__(self, width: int, modes: tuple[str, ...] = ("mean", "max", "last")):
        super().__init__()
        self.width, self.modes, self.both = width, modes, len(modes) * width


class Embedder(nn.Sequential):
    def __init__(self, body: Any):
        super().__init__(Encoder(body), Pool(body.config.hidden_size))


def test_a_number_follows_where_a_holder_of_the_model_has_it_from_the_config() -> None:
    for prefix, inside in (("", False), ("Embedder.", True)):
        model = Embedder(small.bert())
        report = step(model[0].body if inside else model, "hidden_size")
        assert (model[1].width, model[1].both, model[1].modes) == (24, 72, ("mean", "max", "last"))
        assert report.attributes[-2:] == [f"{prefix}1.width", f"{prefix}1.both"]
        assert model[0].longest == 32
        assert report.notes == [outside(f"{prefix}0.longest", "Encoder", 32, 24)]


def test_a_module_that_is_pruned_is_followed_though_it_was_frozen() -> None:
    """``gc.freeze()``, as before a fork, hides what is alive from a search for modules."""
    model = Embedder(small.bert())
    gc.freeze()
    try:
        report = step(model, "hidden_size")
    finally:
        gc.unfreeze()
    assert (model[1].width, model[1].both) == (24, 72)
    assert report.attributes[-2:] == ["1.width", "1.both"]


def test_widths_that_are_not_said_outside_leave_it_alone() -> None:
    model = Embedder(small.bert())
    report = step(model, "intermediate_size")
    assert (model[1].width, model[0].longest, report.notes) == (32, 32, [])


def test_a_holder_without_a_length_and_one_that_is_gone() -> None:
    class Compiled(nn.Module):
        """As torch.compile wraps a model."""

        def __init__(self, body: Any):
            super().__init__()
            self.body, self.width = body, 32

        def __len__(self) -> int:
            raise TypeError("no length")

    model = small.bert()
    holder, gone = Compiled(model), Compiled(model)
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=("hidden_size",)),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    del gone
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.notes == [outside("Compiled.width", "Compiled", 32, 24)]
    assert holder.width == 32


def test_what_is_followed_is_taken_back_where_a_write_fails(monkeypatch: Any) -> None:
    model = Embedder(small.bert())
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=("hidden_size",)),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    before = small.state_of(model[0].body)

    def broken(module: Any, key: str, value: Any) -> None:
        if (key, value) == ("width", 24):
            raise RuntimeError("no")
        nn.Module.__setattr__(module, key, value)

    monkeypatch.setattr(Pool, "__setattr__", broken)
    with pytest.raises(RuntimeError, match="no"):
        pruner.step()
    assert (model[1].width, model[1].both) == (32, 96)
    small.assert_same(before, small.state_of(model[0].body))


def test_a_layer_around_the_model_that_reads_it_is_told() -> None:
    model = small.llama()
    report = step(model.model, "hidden_size")
    assert report.notes == [
        outside("LlamaForCausalLM.lm_head.in_features", "Linear", 32, 24),
    ]


def test_sentence_transformers_pooling(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    small.bert().save_pretrained(tmp_path)
    encoder = Transformer(str(tmp_path))
    model = SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
    inner = next(one for one in model.modules() if isinstance(one, hf.PreTrainedModel))
    report = step(inner, "hidden_size")
    assert report.fields == {"hidden_size": (32, 24)}
    assert model[1].pooling_output_dimension == 24
    model.save(str(tmp_path / "pruned"))
    again = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    assert again[1].pooling_output_dimension == 24
    assert again.encode("a b").shape == (24,)
    assert (again.encode("a b") == model.encode("a b")).all()


def test_numbers_in_files_that_a_pruned_folder_leaves_behind_are_told(tmp_path: Path) -> None:
    files = {
        "1_Pooling/config.json": '{"word_embedding_dimension": 384, "deep": {"also": [384, true]}}',
        "modules.json": '[{"idx": 0, "path": ""}]',
        "broken.json": "{",
        "nested.json": "[" * 100_000,
        "notes.txt": "384",
    }
    (tmp_path / "1_Pooling").mkdir()
    for name, text in {**files, "config.json": "{}", "of-others": '{"width": 384}'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link.json").symlink_to(tmp_path / "of-others")
    left = Copied((), (*files, "link.json"))
    fields = {"hidden_size": (384, 300), "intermediate_size": (1536, 1152)}
    says = "1_Pooling/config.json was not copied; its {} says 384, as hidden_size did: where it "
    assert notes_on_uncopied(find_source(str(tmp_path)), left, fields) == tuple(
        says.format(key) + "goes along by hand and means the same, write 300"
        for key in ("word_embedding_dimension", "deep.also[0]")
    )


# Fields that mirror another one


class BroadConfig(hf.PretrainedConfig):
    model_type = "broad"

    def __init__(self, breadth: int = 8, spread: int = 4, **kwargs: Any):
        self.breadth, self.spread = breadth, spread
        self.hidden_size = breadth
        super().__init__(**kwargs)


class TwiceConfig(BroadConfig):
    """Keeps its own number, which nothing derives and nothing reads."""

    model_type = "twice"

    def __init__(self, emb_size: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if kwargs and not emb_size:
            raise ValueError("emb_size is needed")
        self.emb_size = emb_size


class Broad(hf.PreTrainedModel):
    config_class = BroadConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed = nn.Embedding(40, config.breadth)
        self.up = nn.Linear(config.breadth, config.spread)
        self.down = nn.Linear(config.spread, config.breadth)
        self.head = nn.Linear(config.breadth, 40)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


class Twice(Broad):
    config_class = TwiceConfig


def test_a_field_that_the_config_makes_of_another_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Broad(BroadConfig(breadth=16, spread=12)).eval()
    assert model.config.hidden_size == 16
    report = step(model, "breadth")
    assert report.fields == {"breadth": (16, 12), "hidden_size": (16, 12)}
    assert report.notes == []
    model.save_pretrained(tmp_path)
    assert Broad.from_pretrained(tmp_path).config.hidden_size == 12


def test_a_field_of_the_old_value_that_nothing_reads_is_told() -> None:
    torch.manual_seed(0)
    model = Twice(TwiceConfig(breadth=16, spread=12, emb_size=16)).eval()
    report = step(model, "breadth")
    assert report.fields == {"breadth": (16, 12), "hidden_size": (16, 12)}
    assert report.notes == [
        "config.emb_size is still 16, as breadth was: no code of the class reads it. Set it to 12 "
        "if it means the same"
    ]
