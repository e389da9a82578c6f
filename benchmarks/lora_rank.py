r"""Which rank, which layers, which method? Runs of a recipe side by side, on the user's own scans.

    python benchmarks/lora_rank.py --data_dir Task04_Hippocampus --base tiny-sam --output_dir runs/ranks --baselines \
        -- --plane sagittal --image_size 64 --batch_size 32 --epochs 1 --learning_rate 0.002 --no-augment
    python benchmarks/rank_table.py benchmarks/results/lora_rank

Each rank, placement, method and baseline is one run of `accelerate launch recipes/finetune.py` for each seed. Words
after `--` are further options of the recipe. Each run writes one JSON to --results_dir: scores per case and class in
both conventions, sizes, time of a step, peak memory, versions. Finished runs are skipped, stopped ones resumed from
their checkpoint, failed ones tried again; --dry_run lists the runs that are left. Exit codes: 0 all done, 1 some
failed, 2 wrong input, 75 stopped by a signal.

A placement is targets (q, k, v, out, mlp), "+decoder" for LoRA in the decoder as in SAMed_s, "@" and layers:
"q,v", "q,k,v", "q,k,v,mlp", "q,v+decoder", "q,v@3-5".
"""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import facts, options_parser

from samed_peft.config import METHODS
from samed_peft.errors import InputError, RunInterruptedError, SomeCasesFailedError, exit_on_error, printable
from samed_peft.io import read_json, write_json
from samed_peft.models.bases import open_sam, randomize_weights

RECIPES = Path(__file__).parents[1] / "recipes"
TARGETS = {"q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "out": ["proj"], "mlp": ["lin1", "lin2"]}
LORA_PLUS_RATIO = 16


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    kind: str  # one of rank_table.KINDS
    name: str  # in the table and in file names
    options: tuple[str, ...]  # of the recipe, without seed, data and output
    untrained: bool = False  # replace the base's weights by random ones
    planned: bool = False  # leave to the plan of recipes/finetune.py what the options do not say


@dataclass(frozen=True)
class Planned:
    """A variant with a seed, and the places of its files."""

    variant: Variant
    seed: int
    result: Path
    output: Path

    @classmethod
    def of(cls, variant: Variant, seed: int, args: argparse.Namespace) -> "Planned":
        """Name the files of a variant's run."""
        data = args.data_dir.resolve().name
        name = "-".join((data, variant.kind, re.sub(r"[^\w.@+-]+", "_", variant.name), f"seed{seed}"))
        return cls(variant, seed, args.results_dir / f"{name}.json", args.output_dir / name)


def placement_options(text: str) -> tuple[str, ...]:
    """Options of a recipe for a placement such as "q,v+decoder@3-5"; other texts are refused."""
    found = re.fullmatch(r"(?P<targets>[a-z]+(,[a-z]+)*)(?P<decoder>\+decoder)?(@(?P<first>\d+)-(?P<last>\d+))?", text)
    unknown = set(found["targets"].split(",")) - TARGETS.keys() if found else {text}
    if found is None or unknown:
        raise InputError(
            f"a placement is some of {', '.join(TARGETS)}, joined by commas, +decoder and @FIRST-LAST if wanted; "
            f"found {text!r}"
        )
    options = ["--targets", *itertools.chain.from_iterable(TARGETS[name] for name in found["targets"].split(","))]
    if found["decoder"]:
        options += ["--decoder", "lora"]
    if found["first"]:
        options += ["--layers", *map(str, range(int(found["first"]), int(found["last"]) + 1))]
    return tuple(options)


def variants(args: argparse.Namespace) -> list[Variant]:
    rank = ("--rank", str(args.rank))
    rows = [Variant("rank", f"rank {r}", ("--rank", str(r))) for r in args.ranks]
    rows += [Variant("placement", text, (*rank, *placement_options(text))) for text in args.placements]
    for name in args.methods:
        method = ("--lora_plus_ratio", str(LORA_PLUS_RATIO)) if name == "lora_plus" else ("--method", name)
        rows.append(Variant("method", name, (*rank, *method)))
    if args.baselines:
        rows += [Variant("baseline", name, ("--method", name)) for name in ("decoder", "full")]
        rows.append(Variant("baseline", "no pretraining", rank, untrained=True))
    return rows


def plan(args: argparse.Namespace) -> list[Planned]:
    """List all runs, seed by seed, so that an early stop leaves whole tables of fewer seeds."""
    return [Planned.of(variant, seed, args) for seed, variant in itertools.product(args.seeds, variants(args))]


def write_untrained(base: str, folder: Path) -> None:
    """Save a base's network with random weights."""
    torch.manual_seed(0)
    sam = open_sam(base)
    randomize_weights(sam)
    sam.save_pretrained(folder)


def settings(run: Planned, args: argparse.Namespace) -> dict[str, Any]:
    """Describe a run; results with equal descriptions are interchangeable."""
    return {
        "recipe": args.recipe,
        "data": args.data_dir.resolve().name,
        "base": Path(args.base).name if Path(args.base).exists() else args.base,
        "seed": run.seed,
        "kind": run.variant.kind,
        "variant": run.variant.name,
        "options": [*run.variant.options, *args.options],
    }


def is_finished(run: Planned, args: argparse.Namespace) -> bool:
    """Whether a run's result exists; a file with the result of a different run is refused."""
    if not run.result.is_file():
        return False
    found = read_json(run.result)
    differing = [name for name, value in settings(run, args).items() if found.get(name) != value]
    if differing:
        raise InputError(
            f"{run.result} is of a run with other {', '.join(differing)} ({found.get(differing[0])} there); choose "
            "another --results_dir, or remove it"
        )
    return True


def command(run: Planned, args: argparse.Namespace) -> list[str]:
    base = str(args.output_dir / "untrained_base") if run.variant.untrained else args.base
    launch = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(args.launch)]
    recipe = [str(RECIPES / f"{args.recipe}.py"), "--data_dir", str(args.data_dir), "--output_dir", str(run.output)]
    resume = ["--resume"] if (run.output / "run.json").is_file() else []
    # All cases that are not tested on are trained on, and the last adapter counts, whatever the recipe's default is.
    plain = args.recipe == "finetune" and not run.variant.planned
    start = ["--preset", "samed", "--validation_share", "0"] if plain else []
    options = ["--base", base, "--seed", str(run.seed), *start, *run.variant.options, *args.options]
    return [*launch, *recipe, *options, *resume]


def carry_out(run: Planned, args: argparse.Namespace) -> int:
    """Train, score and write one run's result; returns the exit code of its process."""
    if run.variant.untrained and not (args.output_dir / "untrained_base").is_dir():
        write_untrained(args.base, args.output_dir / "untrained_base")
    run.output.parent.mkdir(parents=True, exist_ok=True)
    log = run.output.with_suffix(".log")
    started = time.monotonic()
    with log.open("ab") as output:
        # A process group, because the training outlives its launcher while it writes a checkpoint.
        process = subprocess.Popen(command(run, args), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            with contextlib.suppress(ProcessLookupError):  # raised once the whole group has ended
                while True:
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            raise RunInterruptedError(f"{run.result.stem} was stopped; the same command goes on with it") from None
    if code == 0:
        write_json(run.result, result(run, args, seconds=time.monotonic() - started))
    return code


def result(run: Planned, args: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """Build one run's JSON: its description, scores and costs."""
    report, used = read_json(run.output / "report.json"), read_json(run.output / "resources.json")
    weights = run.output / "adapter" / "adapter_model.safetensors"
    return {
        **settings(run, args),
        **{convention: report[convention] for convention in ("standard", "samed")},
        "cases": report["cases"],
        "config": {name: value for name, value in read_json(run.output / "run.json").items() if name != "base"},
        "trainable_parameters": used["trainable_parameters"],
        "stored_bytes": weights.stat().st_size,
        **{name: used[name] for name in ("seconds_per_step", "peak_resident_gb", "peak_gpu_gb")},
        "seconds": round(seconds, 1),
        **facts(),
    }


def expected_time(done: Sequence[Path], left: int) -> str:
    """Estimate the time of the runs that are left from the finished ones."""
    if not left:
        return "nothing is left to do"
    if not done:
        return "their time is known once one of them has finished"
    median = statistics.median(read_json(path)["seconds"] for path in done)
    return f"about {left * median / 60:.0f} minutes, by {len(done)} finished ones of {median:.0f} s"


def parse_args() -> argparse.Namespace:
    parser = options_parser(__doc__, "results/lora_rank")
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="as the recipe's")
    add("--output_dir", type=Path, required=True, help="folders and logs of the runs")
    add("--recipe", choices=("finetune", "synapse"), default="finetune")
    add("--base", default="facebook/sam-vit-base", help="as the recipe's")
    add("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64], help="of LoRA on q and v")
    add("--placements", nargs="*", default=["q,k,v", "q,k,v,mlp", "q,v+decoder"], help="at --rank")
    add("--methods", nargs="*", default=["rslora", "dora", "pissa", "lora_plus"], help="at --rank, on q and v")
    add("--baselines", action="store_true", help="decoder alone, full finetuning, a base without pretraining")
    add("--rank", type=int, default=4, help="of placements and methods")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--launch", default="", help="options of accelerate launch in one string; default: its own configuration")
    add("--dry_run", action="store_true", help="print the plan and the expected time")
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:place])
    args.options = words[place + 1 :]
    unknown = set(args.methods) - METHODS.keys() - {"lora_plus"}
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; known are {', '.join(METHODS)} and lora_plus")
    return args


@exit_on_error
def main() -> None:
    args = parse_args()
    carry_out_all(plan(args), args)


def carry_out_all(runs: Sequence[Planned], args: argparse.Namespace) -> None:
    """Carry out the runs that are left, or with --dry_run list them.

    Raises:
        SomeCasesFailedError: some runs failed; the others are done.
    """
    finished = [run for run in runs if is_finished(run, args)]
    left = [run for run in runs if run not in finished]
    print(f"{len(runs)} runs, {len(finished)} finished; {expected_time([run.result for run in finished], len(left))}")
    if args.dry_run:
        for run in left:
            print(f"{run.result.stem}{' (begun)' if run.output.exists() else ''}: {shlex.join(command(run, args))}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both are KeyboardInterrupt now
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # accelerate launch would choose one thread
    failed = []
    for number, run in enumerate(left, start=1):
        code = carry_out(run, args)
        if code:
            failed.append(run)
            log = run.output.with_suffix(".log")
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            # The recipe's own message, if there is one: accelerate launch writes a traceback behind it.
            reasons = [line for line in lines if line.startswith("error: ")] or lines or ["no output"]
            reason = printable(f"{reasons[-1]} ({log})")
            print(f"[{number}/{len(left)}] {run.result.stem} failed with {code}: {reason}", flush=True)
            continue
        finished.append(run)
        dice = read_json(run.result)["standard"]["mean"]["dice"]
        to_come = expected_time([run.result for run in finished], len(left) - number)
        print(f"[{number}/{len(left)}] {run.result.stem}: Dice {dice:.3f}; {to_come}", flush=True)
    if failed:
        raise SomeCasesFailedError(f"{len(failed)} of {len(left)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
