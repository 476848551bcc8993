"""What is planned is what pruning gives: random models, settings, heads and steps."""

from __future__ import annotations

import os
from typing import Any

import torch_pruning as tp
import transformers as hf
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from planned import numbers_of, pruned, steps

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, Width, plan, prunable

CLASSES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "bert": (hf.BertForMaskedLM, hf.BertConfig),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config),
}


def names(width: Width) -> list[str]:
    """The fields of a width as people write them."""
    return [str(path[-1]) for path in width.fields]


@st.composite
def models(draw: st.DrawFn) -> Any:
    """A random tiny model of one of five kinds, and the fields that can be pruned."""
    kind = draw(st.sampled_from(["llama", *CLASSES]))  # the first validates its heads
    key_value = draw(st.sampled_from([1, 2, 3]))
    heads = key_value * draw(st.integers(1, 4))
    per_head = draw(st.sampled_from([4, 6, 8]))
    ffn = draw(st.integers(9, 70))
    common = {"vocab_size": 40, "tie_word_embeddings": draw(st.booleans())}
    cls, config_cls = CLASSES[kind]
    if kind == "t5":
        width = draw(st.integers(8, 50))
        sizes = {"d_model": width, "d_ff": ffn, "d_kv": per_head, "num_heads": heads}
        fields = ("d_model", "d_ff", draw(st.sampled_from(["d_kv", "num_heads"])))
        config = config_cls(**sizes, **common, num_layers=2, decoder_start_token_id=0)
    elif kind == "gpt2":
        fields = ("n_embd", "n_inner", "n_head")
        sizes = dict(zip(fields, (heads * per_head, ffn, heads), strict=True))
        config = config_cls(**sizes, **common, n_layer=2)
    else:
        fields = ("hidden_size", "intermediate_size")
        sizes = dict(zip(fields, (heads * per_head, ffn), strict=True))
        if kind != "bert":
            common["num_key_value_heads"] = key_value
            fields += (draw(st.sampled_from(["num_attention_heads", "num_key_value_heads"])),)
        config = config_cls(**sizes, **common, num_attention_heads=heads, num_hidden_layers=2)
    return cls(config).eval(), draw(st.sets(st.sampled_from(fields), min_size=2))


_SHARES = st.floats(0.02, 0.98)


@st.composite
def head_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments about heads; half of the time none are pruned."""
    if draw(st.booleans()):
        return {"prune_num_heads": False, "gqa": None, "head_pruning_ratio": 0.0}
    gqa = draw(st.sampled_from([None, "query", "group"]))
    return {"prune_num_heads": True, "gqa": gqa, "head_pruning_ratio": draw(_SHARES)}


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "12")),  # ``make test-all`` draws 40
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    models(),
    _SHARES,
    st.dictionaries(st.integers(0, 3), st.floats(0, 1), max_size=2),
    head_settings(),
    st.integers(1, 4),
    st.sampled_from([None, None, 2, 3, 8]),
    st.sampled_from([1.0, 1.0, 0.5]),
)
def test_what_is_planned_is_what_pruning_gives(
    made: Any,
    ratio: float,
    ratios: dict[int, float],
    heads: dict[str, Any],
    number: int,
    round_to: int | None,
    max_ratio: float,
) -> None:
    model, chosen = made
    offered = {name for w in prunable(model).widths if not w.reason for name in names(w)}
    if heads["prune_num_heads"]:
        offered = {name for name in offered if "head" not in name}
    fields = sorted(chosen & offered)
    own = {fields[i]: value for i, value in ratios.items() if i < len(fields)}
    of_hook = {"prune": fields, "ratios": own, "gqa": heads["gqa"]}
    of_pruner: dict[str, Any] = {
        "prune_num_heads": heads["prune_num_heads"],
        "head_pruning_ratio": heads["head_pruning_ratio"],
        "pruning_ratio": ratio,
        "round_to": round_to,
        "iterative_steps": number,
        "max_pruning_ratio": max_ratio,
    }
    result = _result_of(plan, model, **of_hook, **of_pruner)
    if isinstance(result, str):
        event("cannot be pruned")
        assert result == _result_of(
            tp.pruner.BasePruner,
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            hooks=[HFConfigSyncHook(**of_hook)],
            **of_pruner,
        )
        return
    event(f"heads {heads['prune_num_heads']}, adjusted {bool(result.adjusted)}")
    assert result.refusal is None  # something near is found for these classes
    assert pruned(model, result) == steps(result)
    assert result.after is not None
    assert numbers_of(model) == (result.after.parameters, result.after.bytes)


def _result_of(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function returns, or the words of its ``UnsupportedModelError``."""
    try:
        return function(*args, **kwargs)
    except UnsupportedModelError as error:
        return str(error)
