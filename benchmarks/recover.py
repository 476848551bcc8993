"""How many random widths of every model type are recovered from tensor shapes alone.

    python benchmarks/recover.py [--types llama,bert] [--targets 3] [--seed 0] [--jobs 2]

One class per model type of transformers' auto mappings, at its default config, without weights.
A target is the class with one to four width fields at random lower values that it accepts; the map
learned at the default config and the target's shapes have to give a config that builds these
shapes. That is checked here by building once more. Each type runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
FIRST = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION")
PRELOADED = [
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "tp_hf_config.fieldmap.solve",
]
SECONDS, BYTES = 300, 9 << 30
_CHOICES = 8

OTHER = re.compile(
    r"vocab|token|position|image|input_size|patch|label|kernel|window|layer|depths|length|pad|stride|stage|"
    r"seed|channels$|classes|bins|bucket|frames|num_queries|group_size|block_size|version"
)
"""Fields that are no widths: they count layers, symbols, pixels or positions."""
WIDTH = re.compile(r"channels")


def classes() -> dict[str, str]:
    """One class for every model type: a language model or image classifier where there is one."""
    import transformers.models.auto.modeling_auto as auto

    rest = [name for name in dir(auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)]
    order = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in FIRST]
    found: dict[str, str] = {}
    for mapping in [*order, "MODEL_MAPPING_NAMES", *rest]:
        for model_type, names in getattr(auto, mapping).items():
            found.setdefault(model_type, names if isinstance(names, str) else names[0])
    return found


def whole_numbers(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Every whole number above 1 in a config's JSON, and where it stands."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from whole_numbers(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield (*path, key), value


class Trial:
    """One class at its default config."""

    def __init__(self, model_type: str, class_name: str):
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from tp_hf_config.fieldmap.learn_field_map import map_of
        from tp_hf_config.model.build import Refusal, without_data
        from tp_hf_config.model.shapes import shapes

        model = without_data(getattr(transformers, class_name), CONFIG_MAPPING[model_type]())
        if isinstance(model, Refusal):
            raise ValueError(model.reason)
        start = time.process_time()
        self.field_map = map_of(model)
        self.learned = time.process_time() - start
        self.full = shapes(model)
        self.small = dict(self.field_map.shapes)
        self.widths = self._widths()

    def _widths(self) -> dict[tuple[Any, ...], int]:
        """The fields that set widths, alone or with others; the map is not asked."""
        result = {}
        for path, value in whole_numbers(self.field_map.depth.data):
            name = next(key for key in reversed(path) if isinstance(key, str))
            if OTHER.search(name) and not WIDTH.search(name):
                continue
            if self._moves(path, value) or re.search("head", name):
                result[path] = value
        return result

    def _moves(self, path: tuple[Any, ...], value: int) -> bool:
        """Whether a lower value gives other shapes of the same tensors, or is refused."""
        for lower in dict.fromkeys((value // 2, value - 1, 1)):
            built = self.build({path: lower})
            if built is not None and built != self.small:
                return True
        return False

    def build(self, values: dict[tuple[Any, ...], int], full: bool = False) -> Any:
        """Shapes at these values; None: refused, or other tensors than before."""
        from tp_hf_config.model.build import Refusal
        from tp_hf_config.model.config_json import with_values
        from tp_hf_config.model.shapes import shapes, vanished_counts

        data = self.field_map.data if full else self.field_map.depth.data
        model = self.field_map.builder.build(with_values(data, dict(values)))
        if isinstance(model, Refusal):
            return None
        found = shapes(model)
        if found.keys() != (self.full if full else self.small).keys():
            return None
        if not full and vanished_counts(self.field_map.unpruned, model):
            return None
        return found

    def target(self, rng: random.Random) -> dict[tuple[Any, ...], int] | None:
        """One to four fields at lower values that the class accepts, with other shapes."""
        for _ in range(60):
            fields = rng.sample(
                sorted(self.widths, key=str), min(rng.randint(1, 4), len(self.widths))
            )
            ratio = rng.choice((None, None, 0.5, 0.75, 0.25))
            values = {path: self._lower(self.widths[path], ratio, rng) for path in fields}
            built = self.build(values)
            if built is not None and built != self.small:
                return values
        return None

    @staticmethod
    def _lower(value: int, ratio: float | None, rng: random.Random) -> int:
        if ratio is not None and value * ratio >= 1:
            return int(value * ratio)
        step = rng.choice([s for s in (1, 1, 2, 4, 8, 16) if s < value])
        return max(1, rng.randint(max(1, value // 4), value - 1) // step * step)


def outcome(trial: Trial, values: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    """Recover one target and look at what came of it."""
    from tp_hf_config.fieldmap.solve import Conflict, Recovery, recover
    from tp_hf_config.model.config_json import field_name

    target = trial.build(values, full=True)
    said = {field_name(path): [trial.widths[path], value] for path, value in values.items()}
    if target is None:
        return {"result": "no target", "fields": said}
    start = time.perf_counter()
    found = recover(trial.field_map, target)
    choices, given = 0, {}
    while isinstance(found, Conflict) and found.ambiguous and choices < _CHOICES:
        choices += 1
        given |= found.ambiguous[0]
        found = recover(trial.field_map, target, given)
    result = {"fields": said, "seconds": time.perf_counter() - start, "choices": choices}
    if isinstance(found, Recovery):
        from tp_hf_config.model.build import Refusal
        from tp_hf_config.model.shapes import shapes

        again = trial.field_map.builder.build(found.data)
        right = not isinstance(again, Refusal) and shapes(again) == target
        return {"result": "recovered" if right else "wrong", **result}
    if isinstance(found, Conflict):
        why = "; ".join(
            f"{field_name(path)} needs {[str(value) for value in needs]}"
            for path, needs in found.needs.items()
        )
        return {"result": "refused", "why": why or f"ambiguous {found.ambiguous}", **result}
    return {"result": "refused", "why": found.reason, **result}


def work(model_type: str, class_name: str, targets: int, seed: int, conn: Connection) -> None:
    """Try one model type; what happened goes into the pipe."""
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(SECONDS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"type": model_type, "class": class_name, "targets": []}
    start = time.perf_counter()
    try:
        trial = Trial(model_type, class_name)
        result["learned"] = trial.learned
        result["widths"] = len(trial.widths)
        rng = random.Random(f"{seed} {model_type}")
        for _ in range(targets if trial.widths else 0):
            values = trial.target(rng)
            if values is not None:
                result["targets"].append(outcome(trial, values))
    except Exception as error:  # whatever a class raises at its default config
        text = " ".join(str(error).split())
        result["error"] = f"{type(error).__name__}: {text}"[:300]
        if not isinstance(error, ValueError):
            result["trace"] = traceback.format_exc()[-1500:]
    result["seconds"] = time.perf_counter() - start
    conn.send(result)
    conn.close()


def run(todo: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of all types, each from a process of its own, as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: dict[str, tuple[Any, Connection]] = {}
    while todo or running:
        while todo and len(running) < args.jobs:
            model_type, class_name = todo.pop(0)
            ours, theirs = context.Pipe(False)
            process = context.Process(
                target=work, args=(model_type, class_name, args.targets, args.seed, theirs)
            )
            process.start()
            theirs.close()
            running[model_type] = process, ours
        multiprocessing.connection.wait([ours for _, ours in running.values()])
        for model_type, (process, ours) in list(running.items()):
            if not ours.poll():
                continue
            try:
                yield ours.recv()
            except EOFError:
                process.join()
                yield {"type": model_type, "error": f"died: {process.exitcode}", "targets": []}
            process.join()
            del running[model_type]


def report(results: list[dict[str, Any]]) -> None:
    """Totals, misses and the slowest."""
    tried = [(r, t) for r in results for t in r["targets"]]
    counts = Counter(t["result"] for _, t in tried)
    total = len(tried)
    built = [r for r in results if "learned" in r]
    whole = [r for r in built if r["targets"]]
    print(f"{len(results)} types, {len(built)} learned, {len(whole)} with targets")
    for name, count in counts.most_common():
        print(f"{name}: {count} of {total} ({100 * count / max(1, total):.2f} %)")
    told = sum(1 for _, t in tried if t["result"] == "recovered" and t["choices"])
    print(f"of those recovered, {told} fitted several configs and took one that was named")
    full = sum(all(t["result"] == "recovered" for t in r["targets"]) for r in whole)
    print(f"types with every target recovered: {full} of {len(whole)}")
    for r, t in tried:
        if t["result"] != "recovered":
            print(f"  {r['type']} {t['fields']}: {t['result']}: {t.get('why', '')[:300]}")
    for r in results:
        if "error" in r:
            print(f"  {r['type']}: not tried: {r['error']}")
    print("slowest to learn:")
    for r in sorted(built, key=lambda r: -r["learned"])[:10]:
        print(f"  {r['type']} ({r['class']}): {r['learned']:.2f} s")


def main() -> None:
    """Run over all types, or over those named."""
    from rich.progress import track

    from tp_hf_config.reports import dated

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", help="model types, separated by commas; default: all")
    parser.add_argument("--every", type=int, default=1, help="take one type in so many")
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("recover.json"))
    args = parser.parse_args()
    wanted = classes()
    names = args.types.split(",") if args.types else list(wanted)[:: args.every]
    todo = [(name, wanted[name]) for name in names]
    results = []
    for result in track(run(todo, args), "model types", total=len(todo)):
        results.append(result)
        args.output.write_text(json.dumps(dated({"results": results}), indent=1))
    report(results)


if __name__ == "__main__":
    main()
