"""Pruning while training: checkpoints load, and a resumed run ends as one that went on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layer_zoo
import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from tiny_training import DATA, MODELS, TOKENS, gradients, pruner_of

from tp_hf_config import PruningCallback, TrainingError

STEPS = 10
DEEP = {"num_hidden_layers": 11, "num_attention_heads": 4, "num_key_value_heads": 1}


pytestmark = pytest.mark.usefixtures("one_thread", "every_width")


def trained(
    model: Any, callback: PruningCallback, folder: Path, resume: Path | None = None, **changes: Any
) -> hf.Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = hf.TrainingArguments(**{**settings, **changes})
    trainer = hf.Trainer(model, arguments, train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """The same names, and the same values to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def every(number: int = 3, **settings: Any) -> PruningCallback:
    return PruningCallback(every=number, **{"pruning_ratio": 0.3, "iterative_steps": 3, **settings})


def made(model: Any) -> Any:
    return pruner_of(model, pruning_ratio=0.3, iterative_steps=3)


class TestTrainer:
    @pytest.mark.parametrize(
        ("name", "make", "stops", "ffn"),
        [
            ("llama", every, (2, 7), (57, 51, 44)),
            ("llama-tied", every, (3,), (57, 51, 44)),
            ("bert", every, (4,), (57, 51, 44)),
            ("llama-tied", lambda: PruningCallback(made, at=(3, 6, 9)), (6,), (57, 51, 44)),
        ],
        ids=["llama", "llama-tied", "bert", "own pruner"],
    )
    def test_checkpoints_load_and_a_resumed_run_ends_the_same(
        self,
        name: str,
        make: Callable[[], PruningCallback],
        stops: Sequence[int],
        ffn: tuple[int, int, int],
        tmp_path: Path,
    ):
        whole = MODELS[name]()
        cls, callback = type(whole), make()
        trainer = trained(whole, callback, tmp_path / "whole")
        checkpoints = [tmp_path / "whole" / f"checkpoint-{n}" for n in range(1, STEPS + 1)]
        widths = []
        for folder in checkpoints:
            loaded, info = cls.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            widths.append((loaded.config.hidden_size, loaded.config.intermediate_size))
        steps = [(hidden, ffn[step]) for step, hidden in enumerate((28, 24, 20))]
        assert widths == [(32, 64)] * 2 + steps[:1] * 3 + steps[1:2] * 3 + steps[2:] * 2
        for stop in stops:
            model, again = cls.from_pretrained(checkpoints[stop - 1]), make()
            resumed = trained(model, again, tmp_path, checkpoints[stop - 1], save_strategy="no")
            configs = [{**m.config.to_dict(), "_name_or_path": ""} for m in (model, whole)]
            assert configs[0] == configs[1]
            assert again.pruner.pruning_history() == callback.pruner.pruning_history()
            assert_equal(model.state_dict(), whole.state_dict())
            first, second = trainer.optimizer.state_dict(), resumed.optimizer.state_dict()
            assert first["param_groups"] == second["param_groups"]
            assert first["state"].keys() == second["state"].keys()
            for number, state in first["state"].items():
                assert_equal(second["state"][number], state)
            assert [r.fields for r in again.hook.reports[1:]] == [
                r.fields for r in callback.hook.reports[stop // 3 :]
            ]

    @pytest.mark.skipif(not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers")
    def test_layers_that_differ(self, tmp_path: Path):
        """Ranked together; checkpoints from before, between and after the steps are resumed.

        There are layers of two digits, and heads go beside the feed-forward units.
        """

        def make() -> PruningCallback:
            return PruningCallback(
                at=(2, 5),
                pruning_ratio=0.3,
                iterative_steps=2,
                prune="intermediate_size",
                gqa="query",
                head_pruning_ratio=0.5,
                global_pruning=True,
                per_layer=True,
            )

        def loaded(folder: Path) -> Any:
            model, info = hf.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, output_loading_info=True
            )
            assert not any(info.values()), info
            return model

        whole, callback = small.llama(**DEEP), make()
        trainer = trained(whole, callback, tmp_path / "whole", max_steps=7)
        assert type(whole).__name__ == "LayerwiseLlamaForCausalLM"
        widths = layer_zoo.widths(whole, ("intermediate_size", "num_attention_heads"))
        assert len(set(widths["intermediate_size"])) > 1
        assert widths["num_attention_heads"] == [2] * 11  # 3 in between do not divide 32
        checkpoints = [tmp_path / "whole" / f"checkpoint-{n}" for n in range(1, 8)]
        assert [type(loaded(folder)).__name__ for folder in checkpoints] == [
            "LlamaForCausalLM",
            *["LayerwiseLlamaForCausalLM"] * 6,
        ]
        for stop in (1, 3, 6):
            model, again = loaded(checkpoints[stop - 1]), make()
            resumed = trained(
                model, again, tmp_path, checkpoints[stop - 1], save_strategy="no", max_steps=7
            )
            assert again.pruner.pruning_history() == callback.pruner.pruning_history()
            assert_equal(model.state_dict(), whole.state_dict())
            assert layer_zoo.widths(model, widths) == widths
            first, second = trainer.optimizer.state_dict(), resumed.optimizer.state_dict()
            assert first["state"].keys() == second["state"].keys()
            for number, state in first["state"].items():
                assert_equal(second["state"][number], state)
        for parameter in whole.parameters():
            state = trainer.optimizer.optimizer.state[parameter]
            assert state["exp_avg"].shape == parameter.shape
        trainer.save_model(str(tmp_path / "final"))
        final = loaded(tmp_path / "final").eval()
        with torch.no_grad():
            assert torch.equal(final(TOKENS).logits, whole.eval()(TOKENS).logits)

    def test_the_pruning_acts_on_the_gradients_of_all_accumulated_batches(self, tmp_path: Path):
        seen: list[list[bool]] = []

        class Importance(tp.importance.GroupTaylorImportance):
            def __call__(self, group: Any) -> Any:
                seen.append([bool((p.grad != 0).any()) for p in model.parameters()])
                return super().__call__(group)

        model = small.llama()
        callback = PruningCallback(
            lambda model: pruner_of(model, importance=Importance(), iterative_steps=2), at=(1, 3)
        )
        trained(model, callback, tmp_path, gradient_accumulation_steps=2, max_steps=3, save_steps=1)
        assert seen == [[True] * 21] * len(seen) != []
        assert model.config.hidden_size == 24
        states = [
            json.loads((tmp_path / f"checkpoint-{n}" / "trainer_state.json").read_text())
            for n in (1, 2, 3)
        ]
        saved = [
            s["stateful_callbacks"]["PruningCallback"]["attributes"]["progress"] for s in states
        ]
        assert [s["step"] for s in saved] == [1, 1, 2]
        assert saved[0]["fields"] == [[["hidden_size"], 32], [["intermediate_size"], 64]]

    def test_a_skipped_step_prunes_nothing_and_the_next_one_does(self):
        model = small.llama()
        inner = torch.optim.AdamW(model.parameters())
        callback = PruningCallback(at=(1,), pruning_ratio=0.5)
        state = hf.TrainerState(max_steps=2)
        arguments = hf.TrainingArguments("unused", report_to="none", use_cpu=True)
        wrapped = SimpleNamespace(optimizer=inner, step_was_skipped=True)
        given = {"model": model, "optimizer": wrapped}
        callback.on_train_begin(arguments, state, hf.TrainerControl(), **given)
        gradients(model)
        callback.on_optimizer_step(arguments, state, hf.TrainerControl(), **given)
        assert model.config.hidden_size == 32
        wrapped.step_was_skipped, state.global_step = False, 1
        callback.on_optimizer_step(arguments, state, hf.TrainerControl(), **given)
        assert model.config.hidden_size == 16
        assert inner.param_groups[0]["params"] == list(model.parameters())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"pruning_ratio": 0.6},
                "pruning_ratio=0.5, but this run has pruning_ratio=0.6. Resume with the settings",
            ),
            (
                {"max_pruning_ratio": 0.9, "round_to": 4},
                "max_pruning_ratio=1.0, round_to=None, but this run has max_pruning_ratio=0.9, "
                "round_to=4. Resume",
            ),
            (
                {"ratios": {"intermediate_size": 0.75}},
                "pruning_ratio_dict[model.layers.0.mlp.gate_proj]=None, ",
            ),
        ],
        ids=["ratio", "several", "field"],
    )
    def test_resuming_with_other_settings_is_refused(
        self, settings: dict[str, Any], message: str
    ) -> None:
        model, own = small.llama(), {"pruning_ratio": 0.5, "iterative_steps": 2}
        own["prune"] = ("intermediate_size",)
        callback = PruningCallback(at=(1, 2), **own)
        state, control = hf.TrainerState(max_steps=2), hf.TrainerControl()
        arguments = hf.TrainingArguments("unused", report_to="none", use_cpu=True)
        given = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
        callback.on_train_begin(arguments, state, control, **given)
        gradients(model)
        callback.on_optimizer_step(arguments, state, control, **given)
        saved = {"PruningCallback": json.loads(json.dumps(callback.state()))}
        for others in ({}, settings):
            other = small.llama(intermediate_size=48)
            before = small.state_of(other)
            state = hf.TrainerState(global_step=1, max_steps=2)
            state.stateful_callbacks = json.loads(json.dumps(saved))
            again = PruningCallback(at=(1, 2), **{**own, **others})
            optimizer = torch.optim.AdamW(other.parameters())
            given = {"model": other, "optimizer": optimizer}
            if not others:
                again.on_train_begin(arguments, state, control, **given)
                continue
            with pytest.raises(TrainingError) as raised:
                again.on_train_begin(arguments, state, control, **given)
            assert str(raised.value).startswith(f"the checkpoint's run pruned with {message}")
            small.assert_same(before, small.state_of(other))

    def test_resuming_with_a_model_that_is_not_the_checkpoints_is_refused(self):
        model = small.llama()
        callback = PruningCallback(at=(1, 2), pruning_ratio=0.5, iterative_steps=2)
        state, control = hf.TrainerState(max_steps=2), hf.TrainerControl()
        arguments = hf.TrainingArguments("unused", report_to="none", use_cpu=True)
        given = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
        callback.on_train_begin(arguments, state, control, **given)
        gradients(model)
        callback.on_optimizer_step(arguments, state, control, **given)
        saved = {"PruningCallback": json.loads(json.dumps(callback.state()))}
        state = hf.TrainerState(global_step=1, max_steps=2, stateful_callbacks=[])
        state.stateful_callbacks = saved
        other = small.llama(hidden_size=24, intermediate_size=44)
        before, parameters = small.state_of(other), list(other.parameters())
        optimizer = torch.optim.AdamW(other.parameters())
        again = PruningCallback(at=(1, 2), pruning_ratio=0.5, iterative_steps=2)
        with pytest.raises(TrainingError) as raised:
            again.on_train_begin(arguments, state, control, model=other, optimizer=optimizer)
        assert str(raised.value) == (
            "model.layers.0.mlp.gate_proj.weight has shape [44, 24], but the pruning steps "
            "recorded in the checkpoint lead to [48, 24]. Load the model from the checkpoint, "
            "from_pretrained(checkpoint), and pass PruningCallback the same arguments as in the "
            "checkpoint's run."
        )
        small.assert_same(before, small.state_of(other))
        assert optimizer.param_groups[0]["params"] == parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "say when to prune, either every=100 or at=(100, 200, 300)"),
        ({"every": 2, "at": (2,)}, "say when to prune, either every=100 or at=(100, 200, 300)"),
        ({"every": 0}, "every=0: expected 1 or more optimizer steps"),
        ({"at": (3, 2)}, "at=(3, 2): expected increasing optimizer steps"),
        ({"at": (0, 2)}, "at=(0, 2): expected increasing optimizer steps"),
        (
            {"every": 2, "build": pruner_of, "pruning_ratio": 0.5},
            "pruning_ratio: your function makes the pruner, so pass these arguments to the pruner "
            "there",
        ),
    ],
)
def test_arguments_that_say_no_schedule_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        PruningCallback(**arguments)
    assert str(raised.value) == f"PruningCallback: {message}"


RUN = {
    "deepspeed": None,
    "fsdp": [],
    "world_size": 1,
    "n_gpu": 0,
    "load_best_model_at_end": False,
    "auto_find_batch_size": False,
    "restore_callback_states_from_checkpoint": False,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            (changes, "the Trainer would continue with the unpruned Parameters that it has wrapped")
            for changes in (
                {"fsdp": ["full_shard"]},
                {"deepspeed": {"a": 1}},
                {"world_size": 2},
                {"n_gpu": 2},
            )
        ),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True would load a checkpoint"),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size=True restarts training with a model",
        ),
        (
            {"restore_callback_states_from_checkpoint": True},
            "restore_callback_states_from_checkpoint=True makes new callbacks without their",
        ),
    ],
)
def test_runs_that_cannot_be_pruned_in_are_refused(changes: dict[str, Any], message: str):
    model = small.llama()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    arguments = SimpleNamespace(**{**RUN, **changes})
    with pytest.raises(TrainingError) as raised:
        every().on_train_begin(arguments, hf.TrainerState(), hf.TrainerControl(), **given)
    assert str(raised.value).startswith(f"PruningCallback: {message}")


def test_two_callbacks_are_refused_before_training():
    model = small.llama()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    state = hf.TrainerState(max_steps=8, stateful_callbacks=[every(), every()])
    with pytest.raises(TrainingError) as raised:
        every().on_train_begin(SimpleNamespace(**RUN), state, hf.TrainerControl(), **given)
    assert str(raised.value) == (
        "PruningCallback: the Trainer has 2 of these callbacks, but a checkpoint stores the "
        "progress of one. Pass one callback that takes all steps: at=(100, 200), iterative_steps=2"
    )


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: PruningCallback(at=(1, 2), pruning_ratio=0.5),
            "at= names 2 optimizer steps, but the pruner has iterative_steps=1. Name one "
            "optimizer step for each of them",
        ),
        (
            every,
            "training ends after 8 optimizer steps, but the last of the pruner's 3 steps comes "
            "after optimizer step 9. Prune earlier or train longer",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused(callback: Any, message: str):
    model = small.llama()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    state = hf.TrainerState(max_steps=8)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        callback().on_train_begin(SimpleNamespace(**RUN), state, hf.TrainerControl(), **given)
    assert str(raised.value) == f"PruningCallback: {message}"


def test_an_optimizer_that_cannot_follow_is_refused_after_its_first_step(tmp_path: Path):
    model = small.llama()
    message = "^PruningCallback: Adafactor keeps 'exp_avg_sq_row' of model.embed_tokens.weight"
    with pytest.raises(TrainingError, match=message):
        trained(model, every(), tmp_path, optim="adafactor")
    assert model.config.hidden_size == 32
    assert list(tmp_path.iterdir()) == []
