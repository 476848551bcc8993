"""Try every width of one class for real, at tiny size: prune, compare, save, load again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from .errors import TPHFConfigError
from .hook import HFConfigSyncHook
from .learn import map_of
from .masked import difference, inputs_left
from .methods import methods_of
from .miniature import Miniature, randomise
from .offers import Width, widths_of
from .passes import Result, outputs_in_float64, warm_up
from .prepare import pruner_kwargs
from .reference import Builder, Refusal, attention_of, config_json
from .ties import saved_buffers

Outcome = Literal["works", "refused", "failed"]
CASE = "case.pt"
RATIO = 0.5
STEPS = (1, 2)
_SHORT = 1024


@dataclass(frozen=True)
class WidthSupport:
    """What pruning one width of a class came to.

    Attributes:
        fields: the config fields that count its units.
        outcome: ``works``: pruned in one step and in two, the pruned model computes what the
            original does with the removed units masked, and a model loaded from the saved folder
            computes the same bits; ``refused``: an error before anything was pruned or written;
            ``failed``: anything else.
        why: the reason, where it does not work.
        graph: which dependency graph pruned it, ``config`` or ``trace``.
        units: how many units it has in the tiny copy.
    """

    fields: tuple[str, ...]
    outcome: Outcome
    why: str = ""
    graph: str = ""
    units: int = 0

    @property
    def name(self) -> str:
        """The fields in one text."""
        return " + ".join(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """The result for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """The tiny model that is pruned in copies, and how it runs.

    Attributes:
        model: the class at the tiny copy's widths with random weights, in float64.
        mini: the tiny copy.
    """

    model: nn.Module
    mini: Miniature


@dataclass(frozen=True)
class Trial:
    """One width pruned in a copy of the tiny model, and where the copy was saved."""

    width: WidthSupport
    folders: tuple[Path, ...] = ()


def subject(mini: Miniature, seed: int) -> Subject:
    """The class at the tiny copy's widths, with random weights from ``seed``.

    They are not the tiny copy's own, so that what experiments saw by chance is seen here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = mini.known.builder.build_real(mini.known.data)
        if isinstance(model, Refusal):  # the tiny copy itself was built from the same config
            raise RuntimeError(model.reason)
        model.tie_weights()  # type: ignore[operator]
        randomise(model)
    with torch.no_grad():
        for value in (*model.parameters(), *saved_buffers(model).values()):
            _as_float32(value)
    _take_computed(model)
    return Subject(model, mini)


def _take_computed(model: Any) -> None:
    """Buffers that are not saved as loading makes them: GPT-J's tables in another precision.

    A class that does not load is left as it is: each trial says why then.
    """
    saved = saved_buffers(model)
    computed = [name for name, _ in model.named_buffers() if name not in saved]
    if not computed:
        return
    with TemporaryDirectory(prefix="tp_hf_config-") as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, **_options(model))
        except Exception:
            return
    own, made = dict(model.named_buffers()), dict(loaded.named_buffers())
    with torch.no_grad():
        for name in computed:
            if name in made and made[name].shape == own[name].shape:
                own[name].copy_(made[name])


def _options(model: Any) -> dict[str, Any]:
    """How a model is loaded again: it has to compute as the one that was saved."""
    attention = attention_of.get(type(model), "eager")
    return {"dtype": torch.float64, "attn_implementation": attention}


def _as_float32(value: torch.Tensor) -> None:
    """Round as classes do that load some weights in float32, whatever is asked for.

    The entries of a short vector stay different: which of them are left is found by value.
    """
    value.copy_(value.float())
    if value.ndim == 1 and len(value) <= _SHORT:
        while len(torch.unique(value)) < len(value):
            value.add_(1e-3 * torch.randn_like(value)).copy_(value.float())


def trials(case: Subject, folder: Path) -> Iterator[Trial]:
    """Prune every width that the library lists for a model, each in copies of its own.

    Args:
        case: the model, which is not changed, and how it runs.
        folder: where pruned copies are saved.
    """
    found = widths_of(case.model, map_of(case.model), case.mini)  # type: ignore[arg-type]
    proved = {name for width in found if width.reason is None for name in width.names}
    for number, width in enumerate(found):
        if width.reason is not None and proved & set(width.names):
            continue  # it goes, only not in this way
        yield _trial(case, width, folder / f"{number:02d}")


def _trial(case: Subject, width: Width, folder: Path) -> Trial:
    folders: list[Path] = []
    graph = ""
    for steps in STEPS if width.units > 2 else STEPS[:1]:
        copied = copy.deepcopy(case.model)
        hook = HFConfigSyncHook()
        try:
            with _quiet():
                pruner = _pruner(copied, width, steps, hook)
        except TPHFConfigError as error:
            return Trial(WidthSupport(width.names, "refused", width.reason or str(error)))
        except Exception as error:
            why = f"{type(error).__name__} from the pruner's constructor: {error}"
            return Trial(WidthSupport(width.names, "failed", _line(why)))
        graph = "config" if hasattr(pruner.DG, "coupled") else "trace"
        failed = _pruned(case, copied, pruner, hook, steps)
        if failed is None and not any(report.groups for report in hook.reports):
            why = width.reason or f"{_least(width)} of {width.units} have to stay"
            return Trial(WidthSupport(width.names, "refused", why, graph, width.units))
        if failed is None:
            folders.append(folder / str(steps))
            left = inputs_left(case.model, copied, case.mini.inputs)
            failed = save(copied, left, folders[-1], case.mini.watched)
        if failed is not None:
            why = _line(f"{steps} steps: {failed}" if steps > 1 else failed)
            return Trial(WidthSupport(width.names, "failed", why, graph, width.units))
    return Trial(WidthSupport(width.names, "works", "", graph, width.units), tuple(folders))


def _least(width: Width) -> int:
    """How many units the class needs, or the kernels it runs on."""
    return max(max(group.least, group.classes) for group in width.groups)


def _pruner(model: nn.Module, width: Width, steps: int, hook: HFConfigSyncHook) -> Any:
    import torch_pruning as tp

    return tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=width.names),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        iterative_steps=steps,
        hooks=[hook],
    )


def _pruned(
    case: Subject, model: Any, pruner: Any, hook: HFConfigSyncHook, steps: int
) -> str | None:
    """Prune to the end and compare; why that failed, or ``None``."""
    try:
        with _quiet():
            for _ in range(steps):
                pruner.step()
        fresh = Builder(model).build_real(config_json(model.config))
        if isinstance(fresh, Refusal):
            return f"the new config does not build: {fresh.reason}"
        return difference(case.model, model, fresh, case.mini.inputs, case.mini.watched)
    except TPHFConfigError as error:
        return f"{type(error).__name__} after the step: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def save(
    model: Any,
    inputs: Mapping[str, Any] | Refusal,
    folder: Path,
    watched: Sequence[Result] = (),
) -> str | None:
    """Save a model with what goes in and what comes out; why that failed, or ``None``."""
    if isinstance(inputs, Refusal):
        return inputs.reason
    try:
        with torch.no_grad():
            outputs = outputs_in_float64(model, inputs, watched)
        model.save_pretrained(folder)
        case: dict[str, Any] = {"inputs": dict(inputs), "watched": [tuple(one) for one in watched]}
        case["methods"] = list(methods_of.get(type(model), ()))
        torch.save({**case, "outputs": outputs, "options": _options(model)}, folder / CASE)
    except Exception as error:
        return f"it cannot be saved: {type(error).__name__}: {error}"
    return None


def reloaded(model_class: Any, folder: Path) -> str | None:
    """Load a saved model and compare bit for bit; where it differs, or ``None``."""
    case = torch.load(folder / CASE, weights_only=True)
    try:
        methods_of[model_class] = tuple(case["methods"])
        options = {**case["options"], "output_loading_info": True}
        model, info = model_class.from_pretrained(folder, **options)
        wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
        if wrong:
            return _line(f"loading reports {wrong}")
        for module in model.modules():  # a part may, where the whole may not (Kimi K2.5)
            if getattr(module, "_can_set_experts_implementation", bool)():
                module.set_experts_implementation("eager")
        for parameter in model.parameters():  # aligned in memory like the live weights
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            watched = [Result(*one) for one in case["watched"]]
            warm_up(model.double().eval(), case["inputs"], watched)
            outputs = outputs_in_float64(model, case["inputs"], watched)
    except Exception as error:
        return _line(f"it cannot be loaded: {type(error).__name__}: {error}")
    same = len(outputs) == len(case["outputs"]) and all(map(torch.equal, outputs, case["outputs"]))
    return None if same else "loaded again it computes other outputs"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
