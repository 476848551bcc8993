"""Hunt with random legal configs: ``python benchmarks/hunt`` (``make hunt``).

Draws options of every class's config and builds the class with random weights. Half of the models
it prunes by defaults, by heads, by rounded and by single widths. Of the other half it drops
layers, and lets layers differ. Each result is compared with the full-size original with the
removed units at zero and the dropped layers passed over, written without the library, and with
what another process loads by the class and by every auto class.
Configs that are done lie in ``.hunt/`` (with ``--write``, in ``docs/hunt.jsonl`` too) and are not
tried again with the same versions and seed, but for those that were wrong with other code.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import places
from figures import listed, totals, write
from hunting import BAD, Hunt, Limits
from pairs import all_pairs

from tp_hf_config.reports import versions

os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew


def main() -> None:
    """Hunt, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="so many configs that run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=180, help="of processor time, a config")
    parser.add_argument("--gib", type=float, default=8.0, help="of memory, a config")
    parser.add_argument("--types", nargs="+", help="only these model types")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--folder", type=Path, help="where results lie")
    parser.add_argument("--written", action="store_true", help="try nothing more")
    written = "put the figures into docs/random-configs.md, and the results into docs/hunt.jsonl"
    parser.add_argument("--write", action="store_true", help=written)
    options = parser.parse_args()
    pairs = [p for p in all_pairs() if not options.types or p.type in options.types]
    pairs = [p for p in pairs if not options.tasks or p.task in options.tasks]
    named = f"{options.seed}-{'-'.join(versions().values())}"
    folder = options.folder or places.ROOT / ".hunt" / named
    limits = Limits(options.seconds, int(options.gib * 2**30))
    hunt = Hunt(pairs, folder, options.seed, limits, places.ROOT / "docs" / "hunt.jsonl")
    if not options.written:
        for row in hunt.run(options.count, options.jobs):
            outcomes = " ".join(mode["outcome"] for mode in row["modes"]) or row["why"]
            print(f"{row['task']} {row['type']} {row['number']}: {outcomes}", flush=True)
            for line in listed([row], BAD):
                print(f"    {line}", flush=True)
    rows = hunt.rows()
    for name, number in totals(rows):
        print(f"{name:<70} {number}")
    print("\n".join(listed(rows, BAD)))
    if options.write:
        hunt.keep()
        write(rows, options.seed, places.ROOT / "docs" / "random-configs.md")


if __name__ == "__main__":
    main()
