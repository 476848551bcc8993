"""The results as a page and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
_INTRO = """\
Measured by `make engines`: SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are pruned to each choice of
widths, saved, and given to every engine in an environment and a process of its own. SmolLM2
continues {prompts} prompts by {tokens} greedy tokens, which have to be those of transformers in
float32; *same* says that they are, and the number beside it the largest difference of a token's
log-probability. For MiniLM it is the largest difference of a component of the embeddings (mean
pooled, length one). Pruned by {versions}.

Widths are heads (query/key-value) x head dim, hidden size, FFN; where layers differ, the smallest
and the largest. Those models are given as `save_pretrained` writes them or, where the row says so,
as `export` does. A pruned model here is not trained again, so its text is poor; what counts is that
it is the same. Every figure is in
[engines.json](engines.json)."""


def page(results: Results) -> str:
    """``docs/engines.md``."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    asked = {"prompts": results["prompts"], "tokens": results["new_tokens"], "versions": versions}
    lines = ["# Engines", "", _INTRO.format(**asked), ""]
    for model in dict.fromkeys(case["model"] for case in results["cases"]):
        lines += [f"## {model}", "", _markdown(_rows(results, model)), ""]
    lines += ["## Which widths go", "", *_summaries(results), ""]
    said = list(_said(results))
    if said:
        lines += ["## What the engines say", "", *said, ""]
    header = ("engine", "versions", "computes in", "may differ by", "measured")
    lines += ["## Versions", "", _markdown([header, *_versions(results)]), ""]
    return "\n".join(lines)


def show(results: Results) -> None:
    """The tables on the terminal."""
    for model in dict.fromkeys(case["model"] for case in results["cases"]):
        header, *rows = _rows(results, model)
        table = Table(title=model)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _asked(results: Results, model: str) -> dict[str, Any]:
    """The engines that were asked about a model, or would have been."""
    generates = model == results["cases"][0]["model"]
    return {
        name: engine
        for name, engine in results["engines"].items()
        if engine["generates" if generates else "embeds"]
    }


def _rows(results: Results, model: str) -> list[tuple[str, ...]]:
    engines = _asked(results, model)
    rows = [("", "widths", *engines)]
    for case in results["cases"]:
        if case["model"] == model:
            cells = (_cell(name, engine, case) for name, engine in engines.items())
            rows.append((case["name"], case["widths"], *cells))
    return rows


def _cell(name: str, engine: dict[str, Any], case: dict[str, Any]) -> str:
    if case.get("engines") is not None and name not in case["engines"]:
        return "not for it"
    if engine["why_not"]:
        return "not installed"
    result = engine["results"].get(case["key"])
    if result is None:
        return "not measured"
    if result["outcome"] in ("refused", "died"):
        return str(result["outcome"])
    off = f"{result['off']:.0e}"
    if result["outcome"] == "same":
        return f"same once told, {off}" if "after" in result else f"same, {off}"
    if "first" not in result:
        return f"DIFFERS, {off}"
    gap = max(one["gap"] for one in result["first"])
    word = "near-tie" if result["outcome"] == "near-tie" else "OTHER TOKENS"
    return f"{word}, gap {gap:.1g}"


def _summaries(results: Results) -> Iterable[str]:
    """For each engine what it takes and what it does not."""
    for name, engine in results["engines"].items():
        if engine["why_not"]:
            yield f"- **{name}** could not be installed: `{engine['why_not']}`"
            continue
        by_outcome: dict[str, list[str]] = {}
        for case in results["cases"]:
            result = engine["results"].get(case["key"])
            if result is not None:
                label = f"{case['model']}: {case['name']} ({case['widths']})"
                by_outcome.setdefault(result["outcome"], []).append(label)
        measured = sum(map(len, by_outcome.values()))
        told = sum("after" in result for result in engine["results"].values())
        right = len(by_outcome.pop("same", ())) + len(by_outcome.pop("near-tie", ()))
        text = f"- **{name}**: {right} of {measured} choices of widths measured give the same"
        text += f", {told} of them once told what to do." if told else "."
        for outcome, labels in by_outcome.items():
            text += f" {outcome.capitalize()}: {'; '.join(labels)}."
        yield f"{text} {engine['note']}".rstrip()


def _said(results: Results) -> Iterable[str]:
    """Every message once, with where it came."""
    where: dict[tuple[str, str], list[str]] = {}
    for name, engine in results["engines"].items():
        for case in results["cases"]:
            result = engine["results"].get(case["key"], {})
            said = result.get("after", result)
            if "why" in said:
                text = f"`{' '.join(said['why'].split())[:400].replace('`', chr(39))}`"
                if "remedy" in said:
                    text += f"; goes with `{said['remedy']}`"
                where.setdefault((name, text), []).append(f"{case['model']}: {case['name']}")
    for (name, text), cases in where.items():
        yield f"- **{name}** ({'; '.join(cases)}): {text}"


def _versions(results: Results) -> Iterable[tuple[str, ...]]:
    for name, engine in results["engines"].items():
        numbers = ", ".join(f"{package} {number}" for package, number in engine["versions"].items())
        within = [
            f"{limit:.0e} ({what})"
            for limit, what, asked in zip(
                engine["within"],
                ("log-probabilities", "embeddings"),
                (engine["generates"], engine["embeds"]),
                strict=True,
            )
            if asked
        ]
        shown = numbers or "not installed"
        yield name, shown, engine["precision"], ", ".join(within), engine["date"]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
