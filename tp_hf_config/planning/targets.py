"""What tools that run or quantise a model require of its widths: one table, with sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

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
    """

    columns: int = 1
    rows: int = 1
    ffn: int = 1
    head_dim: int = 1
    head_dims: tuple[int, ...] = ()
    else_: str = ""
    source: str = ""
    read: str = ""


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
        source=_LLAMA_CPP, read="2026-12-01",
    ),
    "gguf-32": Rule(
        columns=32, else_="llama.cpp stores such weights as F16",
        source=_LLAMA_CPP, read="2026-12-01",
    ),
    "marlin": Rule(
        128, 64, else_="vLLM cannot use its Marlin kernels (GPTQ, AWQ)",
        source=f"{_MARLIN} (verify_marlin_supports_shape)", read="007d5005",
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
_FORMAT_OF_RULE = {"gguf-k": "gguf-q4_k_m", "gguf-32": "gguf-q8_0", "marlin": "w4a16"}


@dataclass(frozen=True)
class Target:
    """Tools that a pruned model is made for.

    Attributes:
        name: as the user wrote it: ``"gguf-k"``, ``"w4a16,tp=2"``.
        rules: those of the tools.
        ranks: tensor-parallel ranks that the model runs on.
        formats: those of quantised files whose sizes are of interest.
    """

    name: str = ""
    rules: tuple[Rule, ...] = ()
    ranks: int = 1
    formats: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Rule | None]:
        """Each name -> its rule; ``None``: the number of ranks."""
        names = [part.strip() for part in self.name.split(",")] if self.name else []
        return {name: None if name.startswith("tp=") else rule_of(name) for name in names}

    def least(self, attribute: str) -> int:
        """Return the least common multiple of one number of all rules."""
        return lcm(*(getattr(rule, attribute) for rule in self.rules))

    @classmethod
    def of(cls, name: str | None) -> Target:
        """Return the target of a name, or of several with commas between; ``None``: of no tool.

        Raises:
            ValueError: a name is unknown, or ``tp=`` is not a number.
        """
        rules: list[Rule] = []
        formats: list[str] = []
        ranks = 1
        for part in (each.strip() for each in name.split(",")) if name is not None else ():
            key, _, number = part.partition("=")
            if key == "tp" and number.isdigit() and int(number):
                ranks = int(number)
            elif part in RULES or part in _RULE_OF_FORMAT:
                rules.append(rule_of(part))
                found = part if part in _RULE_OF_FORMAT else _FORMAT_OF_RULE.get(part)
                formats += [] if found is None else [found]
            else:
                known = ", ".join(dict.fromkeys((*RULES, *_RULE_OF_FORMAT, "tp=N")))
                near = closest(part, RULES)
                raise ValueError(f"target={name!r}: {part!r} is no target{near}. Targets: {known}")
        return cls(name or "", tuple(rules), ranks, tuple(dict.fromkeys(formats)))


def rule_of(name: str) -> Rule:
    """Return the rule of a tool, or of a format of quantised files."""
    return RULES.get(_RULE_OF_FORMAT.get(name, name), Rule())


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield name, what it requires, what happens else and the source of each rule, as text."""
    words = {
        "columns": "inputs of weights % {}", "rows": "outputs of weights % {}", "ffn": "FFN % {}",
        "head_dim": "head dim % {}",
    }  # fmt: skip
    for name, rule in RULES.items():
        needs = [text.format(n) for key, text in words.items() if (n := getattr(rule, key)) > 1]
        yield name, ", ".join(needs), rule.else_, f"{rule.source} ({rule.read})"
