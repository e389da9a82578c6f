"""Attack the package as tests/faults does, but in full: how many trials were made, and how many held.

    python benchmarks/reliability.py
    python benchmarks/reliability.py --attacks kill_points signals --scale 0.1 --seed 3

Kills and failures at file operations, signals, readers beside a writer, damaged and hostile files. Prints one line for
each attack and one for each trial that did not hold, with what is needed to repeat it; writes both as JSON, and a table
as Markdown. All of it takes an hour or two on two cores, and needs Linux and a C compiler.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from measure import facts, options_parser

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from faults import fuzz, hostile, signals, writes
from faults.outcomes import Result, Workshop

ATTACKS = {
    "kill_points": (writes.kill_points, 1000),
    "failing_writes": (writes.failing_writes, 500),
    "fuzz": (fuzz.fuzz, 10_000),
    "one_bad_file": (hostile.one_bad_file, 100),
    "signals": (signals.stopped, 200),
    "readers": (signals.readers, 20_000),
    "flipped_bytes": (fuzz.flipped_bytes, 200),
    "hostile": (hostile.hostile, 200),
}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--trials", type=int, help="of each attack, in place of its own number")
    size.add_argument("--scale", type=float, default=1.0, help="share of each attack's own number of trials")
    parser.add_argument("--processes", type=int, default=2, help="trials at the same time, %(default)s by default")
    args = parser.parse_args()
    machine, found = facts(), {}
    args.results_dir.mkdir(parents=True, exist_ok=True)
    stem = args.results_dir / f"reliability-{machine['date']}"
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), args.processes)
        for name in args.attacks:
            attack, trials = ATTACKS[name]
            started = time.perf_counter()
            result = attack(workshop, trials=args.trials or max(1, round(trials * args.scale)), seed=args.seed)
            print(result.text(), flush=True)
            found[name] = _values(result) | {"seconds": round(time.perf_counter() - started)}
            # After each attack, so that an interruption does not lose hours of work.
            values = machine | {"seed": args.seed, "attacks": found}
            stem.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            stem.with_suffix(".md").write_text(table(found), encoding="utf-8")
        workshop.close()
    print(f"results are in {stem}.json and .md")


def _values(result: Result) -> dict[str, object]:
    failures = [vars(failure) for failure in result.failures]
    return {"tried": result.tried, "held": result.held, "kinds": result.kinds, "failures": failures} | result.notes


def table(found: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    rows = ["| attack | tried | held | did not hold |", "| --- | ---: | ---: | --- |"]
    for name, values in found.items():
        kinds = ", ".join(f"{kind}: {number}" for kind, number in values["kinds"].items())
        rows.append(f"| {name.replace('_', ' ')} | {values['tried']} | {values['held']} | {kinds} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
