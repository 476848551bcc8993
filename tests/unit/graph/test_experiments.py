"""Experiments run once for a class and config: in a process, and with the cache on disk ever."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from memories import forget
from transformers import pytorch_utils
from transformers.models.llama import modeling_llama

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, plan, prunable
from tp_hf_config.fieldmap import learn_field_map
from tp_hf_config.fieldmap.field_map import Depth
from tp_hf_config.forward.run_recipe import RunRecipe
from tp_hf_config.graph import experiments
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.model.build import Builder, without_data
from tp_hf_config.model.disk_cache import VARIABLE, class_digest
from tp_hf_config.pipeline.support import subject
from tp_hf_config.twin.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("every_width")

NAMES = ("llama", "gpt2", "bert", "t5", "whisper", "vit", "deepseek_v3", "mixtral", "qwen2_vl")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def pruner_of(model: Any, prune: Any = None, **settings: Any) -> Any:
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.MagnitudeImportance(),
        hooks=[HFConfigSyncHook(prune=prune)],
        **settings,
    )


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("the class was asked again")


def without_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(learn_field_map, "learn", never)
    monkeypatch.setattr(experiments, "tiny_model", never)
    monkeypatch.setattr(experiments, "find_groups", never)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_modes_around_a_call_change_nothing(
    name: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(name)
    forget(monkeypatch)
    wanted = prunable(model).to_dict()
    forget(monkeypatch)
    with mode():
        assert prunable(model).to_dict() == wanted


def test_nor_do_they_for_the_experiments_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many heads of Mamba 2 share states is seen at another number than the tiny model's."""
    forget(monkeypatch)
    sizes = {"hidden_size": 128, "num_heads": 16, "head_dim": 16, "state_size": 16, "n_groups": 4}
    config = hf.Mamba2Config(num_hidden_layers=1, vocab_size=60, chunk_size=8, **sizes)
    with torch.no_grad():
        widths = prunable(config, model_class=hf.Mamba2ForCausalLM).widths
    (width,) = [width for width in widths if width.name == "head_dim + hidden_size"]
    assert [group.count.channel_groups for group in width.groups] == [1, 8]


def test_threads_learn_one_class_one_after_the_other(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prunable(small.llama()).widths
    forget(monkeypatch)
    monkeypatch.setenv(VARIABLE, str(cache.with_name("other")))
    own = torch.autocast, hf.LlamaConfig.__getattribute__, torch.get_default_dtype()
    learned = []
    learn = learn_field_map.learn
    monkeypatch.setattr(
        learn_field_map,
        "learn",
        lambda *given, **named: learned.append(learn(*given, **named)) or learned[-1],
    )
    configs = [small.llama(intermediate_size=64 + 8 * (n // 2)).config for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda config: prunable(config, model_class=hf.LlamaForCausalLM), configs)
        )
    assert own == (torch.autocast, hf.LlamaConfig.__getattribute__, torch.get_default_dtype())
    assert not pytorch_utils.is_torchdynamo_compiling()
    assert found[0].widths == wanted
    assert {width.reason for one in found for width in one.widths} == {
        width.reason for width in wanted
    }
    assert len(learned) == 3
    assert all(one.values for one in learned)


def test_a_map_without_widths_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = learn_field_map.learn
    with monkeypatch.context() as patch:
        patch.setattr(
            learn_field_map,
            "learn",
            lambda *given: dataclasses.replace(learn(*given), values={}, ratio_partners={}),
        )
        with pytest.raises(UnsupportedModelError, match="no field of"):
            prunable(small.llama())
    forget(monkeypatch)
    assert any(width.reason is None for width in prunable(small.llama()).widths)


def test_what_experiments_found_goes_with_the_field_map(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    field_map = learn_field_map.map_of(small.llama())
    experiments.experiments_of(field_map)
    learn_field_map._learned.clear()  # which keeps the last few, as the next one does
    tiny_model._built.clear()
    gone = weakref.ref(field_map)
    del field_map
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["llama", "mixtral", "swin", "wav2vec2"])
def test_random_numbers_go_on_as_if_there_had_been_no_experiment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    model = zoo.build(name)
    before = torch.random.get_rng_state()
    pruner_of(model)
    prunable(model)
    plan(model, pruning_ratio=0.25)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_was_found(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(name)
    first = prunable(model)
    recipes = recipes_of(model)
    assert not first.cached
    without_experiments(monkeypatch)
    second = prunable(model)
    assert second.cached
    assert second.widths == first.widths
    assert recipes_of(model) == recipes
    assert str(second).startswith(str(first))
    assert str(second).endswith(
        "from the cache of an earlier run (TP_HF_CONFIG_CACHE=off repeats the experiments)"
    )
    assert {**second.to_dict(), "cached": False} == first.to_dict()


def recipes_of(model: Any) -> list[RunRecipe]:
    """How the class is run at full size and at tiny size."""
    full = learn_field_map.map_of(model)
    tiny = experiments.experiments_of(full).tiny
    assert isinstance(tiny, tiny_model.TinyModel)
    return [full.recipe, tiny.recipe]


def test_a_model_that_is_tiny_itself_may_have_more_layers_than_are_looked_at() -> None:
    """The tiny model of SeamlessM4T has four layers; of a config like its own, two show all."""
    full = learn_field_map.map_of(small.llama(num_hidden_layers=4))
    deep = tiny_model.tiny_model(dataclasses.replace(full, depth=Depth(full.data)))
    assert isinstance(deep, tiny_model.TinyModel)
    model = subject(deep, seed=0).model
    assert len(model.model.layers) == 4
    learned = learn_field_map.map_of(model)
    assert learned.depth.data["num_hidden_layers"] == 2
    proved = {width.name for width in widths_of(model, learned, deep) if width.reason is None}
    tiny = experiments.experiments_of(learned).tiny
    assert isinstance(tiny, tiny_model.TinyModel)
    # where sizes that are equal in the tiny model by chance are not
    assert tiny.full_field_map is deep.full_field_map
    assert proved == {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads + num_key_value_heads",
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_a_field_by_itself_has_the_groups_that_all_experiments_give_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(name)
    learned = learn_field_map.map_of(model)
    every = widths_of(model, learned)
    alone = 0
    for width in every:
        learned.remembered.clear()
        if len(width.fields) > 1:
            continue
        asked = widths_of(model, learned, fields=width.fields)
        assert [other for other in asked if other.name == width.name] == [width]
        alone += len(asked) == 1
    assert alone >= 1  # else every width needs all of them


def test_no_more_is_looked_at_than_was_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "find_groups", never)
    first = pruner_of(zoo.build("llama"), ("intermediate_size", "hidden_size"))
    without_experiments(monkeypatch)
    monkeypatch.setattr(experiments, "find_alone", never)
    second = pruner_of(zoo.build("llama"), ("intermediate_size", "hidden_size"))
    for pruner in (first, second):
        assert {field for fields in pruner.DG.fields for field in fields} == {
            ("intermediate_size",),
            ("hidden_size",),
        }
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        pruner_of(zoo.build("llama"), "num_key_value_heads")  # go with query heads


def test_a_field_as_wide_as_another_is_proved_without_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = learn_field_map.map_of(
        small.llama(hidden_size=32, intermediate_size=32, vocab_size=32)
    )
    every = experiments.experiments_of(learned).findings
    learned.remembered.clear()
    forget(monkeypatch)
    monkeypatch.setattr(experiments, "find_groups", never)
    asked = experiments.experiments_of(learned, fields=(("intermediate_size",),))
    assert asked.fields == (("intermediate_size",),)
    assert asked.findings == tuple(f for f in every if f.fields == asked.fields)


@pytest.mark.full
def test_a_field_as_wide_as_a_part_that_no_output_shows_needs_all_experiments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No output depends on CSM's depth decoder, which might read it."""
    forget(monkeypatch)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "vocab_size": 64, "num_codebooks": 4}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.CsmConfig(
        **sizes,
        depth_decoder_config={**sizes, "backbone_hidden_size": 32},
        bos_token_id=1,
        audio_token_id=2,
        audio_eos_token_id=3,
    )
    model = without_data(hf.CsmForConditionalGeneration, config)
    learned = learn_field_map.map_of(model)
    result = experiments.experiments_of(learned, fields=(("intermediate_size",),))
    assert result.fields == ()
    (finding,) = [f for f in result.findings if f.fields == (("intermediate_size",),)]
    assert finding.reason == (
        "depth_decoder_config.intermediate_size has the same width, and its part of the model did "
        "not run"
    )


def test_a_model_is_pruned_with_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prunable(small.llama(num_key_value_heads=2))
    without_experiments(monkeypatch)
    model = small.llama(num_key_value_heads=2)
    pruner = pruner_of(model, pruning_ratio=0.5, prune_num_heads=True, head_pruning_ratio=0.5)
    pruner.step()
    (hook,) = pruner.step.hooks
    assert hook.last_report is not None
    assert hook.last_report.fields == {
        "hidden_size": (32, 16),
        "intermediate_size": (64, 32),
        "num_attention_heads": (4, 2),
    }


def test_models_of_other_sizes_share_the_proofs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def llama(**sizes: int) -> Any:
        sizes = {"vocab_size": 512, "num_key_value_heads": 8, **sizes}
        return prunable(hf.LlamaConfig(**sizes), model_class=hf.LlamaForCausalLM)

    one = llama(hidden_size=2048, intermediate_size=8192, num_attention_heads=32)
    forget(monkeypatch)
    monkeypatch.setattr(experiments, "find_groups", never)
    other = llama(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80
    )
    assert [width.name for width in other.widths] == [width.name for width in one.widths]
    assert all(
        (w.reason is None) is (o.reason is None)
        for w, o in zip(one.widths, other.widths, strict=True)
    )


def test_a_folder_under_another_name_is_not_tried_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = zoo.build("llama")
    first = prunable(model)
    without_experiments(monkeypatch)
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert loaded.config._name_or_path == str(tmp_path / name)
        again = prunable(loaded)
        assert again.cached
        assert again.widths == first.widths
        learned = learn_field_map.map_of(loaded)
        assert learned.data["_name_or_path"] == str(tmp_path / name)


def test_a_model_in_another_precision_shares_the_proofs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prunable(zoo.build("llama"))
    forget(monkeypatch)
    monkeypatch.setattr(experiments, "find_groups", never)
    model: Any = zoo.build("llama").bfloat16()
    model.config.dtype = torch.bfloat16
    assert prunable(model).widths == first.widths


def test_they_share_them_in_one_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    asked = []
    own = experiments.find_groups
    monkeypatch.setattr(experiments, "find_groups", lambda tiny: asked.append(tiny) or own(tiny))
    for hidden_size, intermediate_size, heads in ((2048, 8192, 32), (8192, 28672, 64)):
        config = hf.LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=heads,
            vocab_size=512,
            num_key_value_heads=8,
        )
        widths = prunable(config, model_class=hf.LlamaForCausalLM).widths
        assert {width.name: width.units for width in widths}["hidden_size"] == hidden_size
    assert len(asked) == 1


def test_layers_that_differ_are_experimented_with_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    asked = []
    own = experiments.find_groups
    monkeypatch.setattr(experiments, "find_groups", lambda tiny: asked.append(tiny) or own(tiny))
    model = zoo.build("llama")
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        pruning_ratio=0.3,
        global_pruning=True,
        importance=tp.importance.GroupMagnitudeImportance(),
        iterative_steps=3,
        hooks=[HFConfigSyncHook(per_layer=True, prune="intermediate_size")],
    )
    for _ in range(3):
        pruner.step()
    assert len(asked) == 1


def test_the_tiny_model_is_built_again_where_it_is_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama")
    prunable(model)
    forget(monkeypatch)
    made = experiments.experiments_of(learn_field_map.map_of(model)).tiny
    assert isinstance(made, tiny_model.TinyModel)
    assert "_run" not in vars(made)
    assert made.model(**made.inputs).logits.shape[:1] == (2,)


def test_a_class_whose_tiny_model_does_not_run_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama")
    with monkeypatch.context() as patch:
        refusal = tiny_model.Refusal("the tiny model does not run: for some reason")
        patch.setattr(experiments, "tiny_model", lambda _: refusal)
        first = prunable(model)
    without_experiments(monkeypatch)
    second = prunable(model)
    assert {width.reason for width in second.widths} == {refusal.reason}
    assert second.widths == first.widths


class TestDigest:
    def digest(self, model: Any) -> str | None:
        return class_digest(Builder(model), model)

    def test_it_is_the_class_not_the_config(self) -> None:
        one, other = small.llama(), small.llama(hidden_size=64)
        assert self.digest(one) == self.digest(other)
        assert self.digest(one) == self.digest(one.bfloat16())
        assert self.digest(one) != self.digest(zoo.build("gpt2"))

    @pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "LlamaMLP", "LlamaMLP.forward"])
    def test_it_is_another_where_code_was_replaced(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = small.llama()
        before = self.digest(model)
        if name == "LlamaMLP":
            other: Any = type("LlamaMLP", (modeling_llama.LlamaMLP,), {"__module__": __name__})
            monkeypatch.setattr(modeling_llama, name, other)
        elif name == "LlamaMLP.forward":
            monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
        else:
            monkeypatch.setattr(modeling_llama, name, lambda q, k, *_: (q, k))
        assert self.digest(model) != before

    def test_it_reads_the_files_of_functions_that_are_imported(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "rolling_helpers.py"
        monkeypatch.syspath_prepend(tmp_path)
        code = "def _by(): return 0\ndef rolled(q, k, *_): return q.roll(_by()), k\n"
        file.write_text(code)
        helpers = importlib.import_module(file.stem)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", helpers.rolled)
        model = small.llama()
        before = self.digest(model)
        assert before is not None
        file.write_text(code.replace("0", "1"))
        assert self.digest(model) != before
        file.unlink()
        assert self.digest(model) is None

    def test_it_is_the_same_in_every_process(self) -> None:
        code = """
            import transformers as hf
            from tp_hf_config.model.build import Builder, without_data
            from tp_hf_config.model.disk_cache import class_digest
            model = without_data(hf.LlamaForCausalLM, hf.LlamaConfig(num_hidden_layers=1))
            print(class_digest(Builder(model), model))
            """
        assert len({small.python(code) for _ in range(2)}) == 1

    def test_a_class_that_was_typed_has_none(self) -> None:
        typed: dict[str, Any] = {"hf": hf, "__name__": "nowhere"}
        exec("class Typed(hf.LlamaForCausalLM):\n    pass", typed)
        model = typed["Typed"](small.llama().config)
        assert self.digest(model) is None


def test_another_process_reads_it(cache: Path) -> None:
    config = small.llama().config.to_dict()
    code = f"""
        import json, os
        os.environ["{VARIABLE}"] = {str(cache)!r}
        import transformers as hf
        from tp_hf_config import prunable
        config = hf.LlamaConfig.from_dict(json.loads({json.dumps(config)!r}))
        print(json.dumps(prunable(config, model_class=hf.LlamaForCausalLM).to_dict()))
        """
    first, second = (json.loads(small.python(code)) for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["widths"] == second["widths"]


def test_a_tiny_model_with_more_layers_lends_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kinds of layers may be fewer at tiny widths (Gemma 3n): nothing is searched again."""
    model = small.llama(num_hidden_layers=4)
    field_map = learn_field_map.map_of(model)
    given = tiny_model.built_tiny_model(field_map, field_map.data)
    assert isinstance(given, tiny_model.TinyModel)
    full = learn_field_map.map_of(small.llama(num_hidden_layers=4, hidden_size=128))
    given = dataclasses.replace(given, full_field_map=full)
    monkeypatch.setattr(experiments, "tiny_model", None)  # it is not asked
    built = experiments._with_fewest_layers(field_map, given)
    assert isinstance(built, tiny_model.TinyModel)
    layers, fewer = len(given.model.model.layers), len(built.model.model.layers)
    assert (layers, fewer) == (4, len(field_map.build_at({}).model.layers))
    assert fewer < layers
    assert built.model.config.hidden_size == given.model.config.hidden_size
    assert built.full_field_map is full
