"""The results as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from real_models import GEMMA_3, SMOLLM2

_INTRO = """\
# Tools that come after

`make downstream`: SmolLM2-135M-Instruct and Gemma 3 270M are pruned by the commands below and given
to every tool, each in an environment of its own. Measured {date}; pruned by {versions}.

Perplexity is that of eight windows of 256 tokens of the Python reference, which the models were not
calibrated on. **A cell says how much it changes from the same model in float32.** *Refused*: the
tool's words are below. "n left": so many linear layers are not quantised, mostly without a message;
in llama.cpp: so many tensors are stored in a larger format, and the change is that from its F16.

## SmolLM2-135M

{smollm2}

SmolLM2 has a hidden size of 576, which no group of 128 or 256 divides, and nine heads, of which
LlamaConfig demands that they divide the hidden size. So its files have larger formats in Q4_K_M,
pruned or not, and llm-compressor's W4A16 takes none of these models.

## Gemma 3 270M

Its hidden size is 640, a multiple of 128 but not of 256. The weights come from a file in Q4_K_M,
so that this format costs less than it would of the original weights.

{gemma}

PEFT: LoRA of all linear layers on 16 windows; the adapter, and the merged model, are saved and
loaded. TRL: 8 steps of supervised fine-tuning, saved and loaded. Their cells give the perplexity
before and after; {off} is the largest difference of a logit between a model in memory and loaded.

## Size and speed in llama.cpp

Size of the file, perplexity by `llama-perplexity` (the second half of each window), and tokens per
second of a prompt of 128 tokens and of 32 new ones: the mean of five runs of `llama-bench`. The
machine did other work meanwhile, so speeds are rough.

{llama_cpp}

## How the models were made

{made}

## What the tools say

{said}

## Versions

{tools}
"""


def page(numbers: dict[str, Any]) -> str:
    """Return ``docs/downstream.md``."""
    cases, answers = numbers["cases"], numbers["answers"]
    smollm2, gemma = (
        _markdown(list(_answers(numbers, [case for case in cases if case["model"] == model])))
        for model in (SMOLLM2, GEMMA_3)
    )
    made = [f"- {_named(case)}: `{line}`" for case in cases for line in case["commands"]]
    offs = [a["off"] for given in answers.values() for a in given.values() if "off" in a]
    return _INTRO.format(
        date=numbers["date"],
        versions=", ".join(f"{name} {number}" for name, number in numbers["versions"].items()),
        smollm2=smollm2,
        gemma=gemma,
        off=f"{max(offs, default=0):.0e}",
        llama_cpp=_markdown(list(_sizes(numbers))),
        made="\n".join(made),
        said="\n".join(_said(numbers)) or "Nothing was refused.",
        tools=_markdown([["tool", "versions"], *_versions(numbers)]),
    )


def _answers(numbers: dict[str, Any], cases: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["", *(case["name"] for case in cases)]
    yield ["hidden size, FFN", *(case["widths"] for case in cases)]
    yield ["parameters", *(f"{case['parameters'] / 1e6:,.1f} M" for case in cases)]
    yield ["perplexity in float32", *(f"{case['perplexity']:.2f}" for case in cases)]
    for name in numbers["tools"]:
        given = numbers["answers"].get(name, {})
        base = numbers["answers"].get("llama.cpp F16") if name.startswith("llama.cpp") else None
        yield [name, *(_cell(given.get(case["key"]), case, base) for case in cases)]


def _named(case: dict[str, Any]) -> str:
    return f"{case['model'].split()[0].split('-')[0]}, {case['name']}"


def wrong(numbers: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of models that were made for a tool's target, and that it does not take."""
    for name, tool in numbers["tools"].items():
        for case in numbers["cases"]:
            answer = numbers["answers"].get(name, {}).get(case["key"], {})
            if tool["target"] in case["fits"] and (
                {"error", "died"} & answer.keys() or answer.get("left") or answer.get("fallbacks")
            ):
                yield f"{name}: {_named(case)}: {_cell(answer, case, None)}"


def _cell(answer: dict[str, Any] | None, case: dict[str, Any], base: Any) -> str:
    if answer is None:
        return "not measured"
    if "died" in answer:
        return "did not end"
    if "error" in answer:
        return "refused"
    if "bits_per_byte" in answer:
        return f"{answer['bits_per_byte']:.3f} bits a byte"
    if "before" in answer:
        return f"{answer['before']:.2f} -> {answer['perplexity']:.2f}"
    before = case["perplexity"]
    if base is not None:
        before = base.get(case["key"], {}).get("perplexity", before)
    cell = f"{answer['perplexity'] / before - 1:+.1%}"
    left = answer.get("left", 0) or answer.get("fallbacks", 0)
    return f"{cell}, {left} left" if left else cell


def _sizes(numbers: dict[str, Any]) -> Iterator[list[str]]:
    names = [name for name in numbers["tools"] if name.startswith("llama.cpp")]
    yield ["", *names]
    for case in numbers["cases"]:
        cells = []
        for name in names:
            answer = numbers["answers"][name].get(case["key"], {"error": ""})
            if "error" in answer:
                cells.append("refused" if answer["error"] else "not measured")
                continue
            speeds = f"{answer['prompt_per_second']:,.0f}, {answer['new_per_second']:,.1f}"
            size = f"{answer['bytes'] / 1e6:,.1f} MB"
            cells.append(f"{size}; {answer['perplexity']:.2f}; {speeds} tokens/s")
        yield [_named(case), *cells]


def _said(numbers: dict[str, Any]) -> Iterator[str]:
    """Yield each message once, with where it came."""
    where: dict[tuple[str, str], list[str]] = {}
    for name, tool in numbers["tools"].items():
        if tool["why_not"]:
            yield f"- **{name}** could not be installed: `{tool['why_not']}`"
        for case in numbers["cases"]:
            answer = numbers["answers"].get(name, {}).get(case["key"], {})
            said = answer.get("error") or answer.get("died")
            if said:
                text = " ".join(said.split())[:300].replace("`", "'")
                where.setdefault((name, text), []).append(_named(case))
    for (name, text), cases in where.items():
        yield f"- **{name}** ({'; '.join(cases)}): `{text}`"


def _versions(numbers: dict[str, Any]) -> Iterator[list[str]]:
    seen: dict[str, list[str]] = {}
    for name, tool in numbers["tools"].items():
        shown = ", ".join(f"{package} {number}" for package, number in tool["versions"].items())
        seen.setdefault(shown or "not installed", []).append(name)
    yield from ([", ".join(names), shown] for shown, names in seen.items())


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rest))
