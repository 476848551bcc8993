"""What a user asks of pruning, checked, and what tools require of widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any, Literal

from ..errors import closest


@dataclass(frozen=True)
class Rule:
    """What one tool requires of weights; 1: nothing.

    Attributes:
        columns: what the number of a weight's inputs has to be a multiple of, on every rank.
        rows: the same for its outputs.
        ffn: the same for the inner width of feed-forward layers and experts.
        head_dim: the same for the head dim.
        head_dims: the only head dims, if not all are taken.
        else_: what the tool does with other widths.
        source: where the rule is written.
        read: the version in which it was read.
        ranks: tensor-parallel ranks among which heads and inner widths are divided.
        format: of quantised files whose size is of interest.
    """

    columns: int = 1
    rows: int = 1
    ffn: int = 1
    head_dim: int = 1
    head_dims: tuple[int, ...] = ()
    else_: str = ""
    source: str = ""
    read: str = ""
    ranks: int = 1
    format: str = ""


_LLAMA_CPP = "llama.cpp, src/llama-quant.cpp (tensor_type_fallback)"
_MARLIN = "vLLM, layers/quantization/utils/marlin_utils.py"
_DECI = "llama.cpp conversion/deci.py, SGLang, mlx-lm, TensorRT-LLM (DeciLM: ffn_mult)"
RULES: dict[str, Rule] = {
    "tensor-cores": Rule(
        64, 64, else_="kernels are slower", read="2026-12-01",
        source="NVIDIA, Matrix Multiplication Background User's Guide",
    ),
    "gguf-k": Rule(
        columns=256, else_="llama.cpp stores such weights as Q5_0, Q8_0 or F16",
        source=_LLAMA_CPP, read="2026-12-01", format="gguf-q4_k_m",
    ),
    "gguf-32": Rule(
        columns=32, else_="llama.cpp stores such weights as F16",
        source=_LLAMA_CPP, read="2026-12-01", format="gguf-q8_0",
    ),
    "marlin": Rule(
        128, 64, else_="vLLM cannot use its Marlin kernels (GPTQ, AWQ)",
        source=f"{_MARLIN} (verify_marlin_supports_shape)", read="007d5005", format="w4a16",
    ),
    "marlin-moe": Rule(
        128, 128, else_="vLLM cannot use its Marlin kernels for experts",
        source=f"{_MARLIN} (check_moe_marlin_supports_layer)", read="007d5005",
    ),
    "w4a16": Rule(
        columns=128, else_="llm-compressor and AutoAWQ refuse groups of 128",
        source="compressed-tensors, quantization/lifecycle/forward_helpers.py; vLLM issue 21695",
        read="compressed-tensors 0.20.1",
    ),
    "fp8": Rule(
        16, 16, else_="scaled matrix products refuse them",
        source="vLLM issues 7550, 52997", read="2026-12-01",
    ),
    "fp8-block": Rule(
        128, 128, else_="blocks of 128 x 128 do not fit", source="vLLM issue 54178",
        read="2026-12-01",
    ),
    "mlx-4bit": Rule(
        columns=64, else_="MLX does not quantise them", source="MLX, mlx/ops.cpp (quantize)",
        read="2026-12-01",
    ),
    "ffn-mult": Rule(ffn=256, else_="DeciLM cannot name them", source=_DECI, read="2026-12-01"),
    "attention": Rule(
        head_dim=8, else_="flash attention refuses it, as it does more than 256",
        source="flash-attention, csrc/flash_attn/flash_api.cpp", read="2026-12-01",
    ),
    "vllm-cpu": Rule(
        head_dim=16, head_dims=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),
        else_="vLLM's attention on a CPU refuses it", source="vLLM, cpu_attn.py",
        read="2026-12-01",
    ),
}  # fmt: skip


# A format of quantised files -> the rule of its rows; its size is computed (``quantised.py``).
_RULE_OF_FORMAT = {
    **dict.fromkeys(("gguf-q4_k_m", "gguf-q5_k_m", "gguf-q6_k"), "gguf-k"),
    **dict.fromkeys(("gguf-q4_0", "gguf-q8_0"), "gguf-32"),
    "w4a16": "w4a16",
    "int4": "w4a16",  # torchao skips other rows
    "int8": "",
    "gguf-f16": "",
}


def _rule_of(part: str) -> Rule | None:
    """Return the rule of a tool, a format of quantised files or a number of ranks, if it is one."""
    key, _, number = part.partition("=")
    if key == "tp" and number.isdigit() and int(number):
        return Rule(ranks=int(number), else_="these cannot be divided among the ranks")
    if part in _RULE_OF_FORMAT:
        return replace(RULES.get(_RULE_OF_FORMAT[part], Rule()), format=part)
    return RULES.get(part)


@dataclass(frozen=True)
class Target:
    """Tools that a pruned model is made for.

    Attributes:
        name: as the user wrote it: ``"gguf-k"``, ``"w4a16,tp=2"``.
        rules: each part of the name -> its rule.
    """

    name: str = ""
    rules: Mapping[str, Rule] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(rule.format for rule in self.rules.values() if rule.format))

    def least(self, attribute: str) -> int:
        """Return the least common multiple of one number of all rules."""
        return lcm(*(getattr(rule, attribute) for rule in self.rules.values()))

    @classmethod
    def of(cls, name: str | None) -> Target:
        """Return the target of a name, or of several with commas between; ``None``: of no tool.

        Raises:
            ValueError: a name is unknown, or ``tp=`` is not a number.
        """
        rules: dict[str, Rule] = {}
        for part in (each.strip() for each in name.split(",")) if name is not None else ():
            rule = _rule_of(part)
            if rule is None:
                known = ", ".join(dict.fromkeys((*RULES, *_RULE_OF_FORMAT, "tp=N")))
                near = closest(part, RULES)
                raise ValueError(f"target={name!r}: {part!r} is no target{near}. Targets: {known}")
            rules[part] = rule
        return cls(name or "", rules)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield name, what it requires, what happens else and the source of each rule, as text."""
    words = {
        "columns": "inputs of weights % {}", "rows": "outputs of weights % {}", "ffn": "FFN % {}",
        "head_dim": "head dim % {}",
    }  # fmt: skip
    for name, rule in RULES.items():
        needs = [text.format(n) for key, text in words.items() if (n := getattr(rule, key)) > 1]
        yield name, ", ".join(needs), rule.else_, f"{rule.source} ({rule.read})"


# how grouped heads are pruned: as many query heads from every group, or whole groups
Gqa = Literal["query", "group"]

INNER = "inner"  # instead of a field's name: the inner widths, of feed-forward layers and experts

# (final ratio, number of steps) -> the ratios from step 0 on
Scheduler = Callable[[float, int], Sequence[float]]


@dataclass(frozen=True)
class PruneSettings:
    """What a user asks of pruning; see :func:`~tp_hf_config.plan`."""

    # None: inner widths; in a class without them, every width inside the model
    prune: tuple[str, ...] | None = None
    pruning_ratio: float = 0.5
    ratios: dict[str, float] = field(default_factory=dict)
    prune_num_heads: bool = False
    gqa: Gqa | None = None
    head_pruning_ratio: float = 0.0
    iterative_steps: int = 1
    round_to: int | None = None
    max_pruning_ratio: float = 1.0
    iterative_pruning_ratio_scheduler: Scheduler | None = None
    per_layer: bool = False
    target: str | None = None  # tools that the widths have to suit

    def __post_init__(self) -> None:
        ratio = self.head_pruning_ratio
        if not self.prune_num_heads and (self.gqa or ratio):
            how = f"gqa={self.gqa!r}" if self.gqa else f"head_pruning_ratio={ratio:g}"
            raise ValueError(
                f"{how} asks for attention heads to be pruned, but prune_num_heads=False keeps all "
                "of them. Leave one of the two out"
            )
        if self.round_to is not None and self.target is not None:
            raise ValueError(
                f"round_to={self.round_to} and target={self.target!r}: both say what widths are "
                "multiples of. Leave one of the two out"
            )
        Target.of(self.target)  # raises

    @classmethod
    def of(
        cls,
        prune: str | Iterable[str] | None,
        ratios: Mapping[str, float] | None,
        prune_num_heads: bool | None,
        gqa: Gqa | None,
        head_pruning_ratio: float = 0.0,
        **others: Any,
    ) -> PruneSettings:
        if prune == INNER or (prune is None and ratios is None):
            names = None  # inner widths
        else:
            fields = prune or ratios or ()  # without prune=, ratios= names the fields
            names = (fields,) if isinstance(fields, str) else tuple(fields)
        if prune_num_heads is None:
            prune_num_heads = bool(gqa or head_pruning_ratio)
        return cls(
            prune=names,
            ratios=dict(ratios or {}),
            prune_num_heads=prune_num_heads,
            gqa=gqa,
            head_pruning_ratio=head_pruning_ratio,
            **others,
        )

    def in_every_layer(self, names_of: Callable[[str], Sequence[str]]) -> PruneSettings:
        """Replace fields that represent all layers by those that ``names_of`` returns for them."""
        prune = self.prune and tuple(dict.fromkeys(n for p in self.prune for n in names_of(p)))
        ratios = {name: ratio for given, ratio in self.ratios.items() for name in names_of(given)}
        return replace(self, prune=prune, ratios=ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for ``json.dumps``, without the scheduler."""
        values = {**vars(self), "prune": None if self.prune is None else list(self.prune)}
        del values["iterative_pruning_ratio_scheduler"]
        return values
