"""Speed and memory of training SAM and predicting: this package, plain Transformers with PEFT, and SAMed.

    git clone https://github.com/hitachinsk/SAMed && pip install einops icecream imageio tensorboardX
    python benchmarks/throughput.py --samed_dir SAMed

Each subject runs in its own process, in turn, from the same weights (random ones, without --base). A subject is:

    samed_peft    this package, with its own training step and file prediction
    peft-sdpa     `transformers.SamModel` with its SDPA attention and stock PEFT, LoRA on the fused `qkv`
    peft-eager    the same with the eager attention
    samed         the original code (--samed_dir), in float32, as its trainer does

benchmarks/README.md says how times, memory and the share of the GEMM peak are measured, and what to look out for. ViT-B
at 512 pixels takes some 20 minutes on two idle cores, `--geometry tiny --rounds 1` half a minute. Prints Markdown and
writes one JSON to benchmarks/results. Memory is read from /proc, so this runs on Linux.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
from measure import Worker, spread, with_range

PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
SUBJECTS = ("samed_peft", "peft-sdpa", "peft-eager", "samed")
Figures = dict[str, Any]


def make(args: argparse.Namespace) -> Any:
    """Build `args.subject`, in its process; imports run here because every process imports this module."""
    if args.subject == "samed":
        from throughput_original import Original

        return Original(args)
    from throughput_peers import PlainPeft, SamedPeft

    return SamedPeft(args) if args.subject == "samed_peft" else PlainPeft(args, args.subject.removeprefix("peft-"))


def worker(args: argparse.Namespace, subject: str, precision: str) -> Worker:
    """Start the process of a subject."""
    options = copy.copy(args)
    options.subject, options.mixed_precision = subject, precision
    return Worker(make, options, forked=args.forked and subject != "samed")


def start_workers(args: argparse.Namespace) -> dict[str, Worker]:
    """Start a process for each subject and precision, under names such as "samed_peft float32"."""
    pairs = [(name, precision) for precision in args.mixed_precision for name in args.subjects if name != "samed"]
    # The original has only float32.
    pairs += [(name, "no") for name in args.subjects if name == "samed"]
    return {f"{name} {PRECISIONS[precision]}": worker(args, name, precision) for name, precision in pairs}


def take_turns(workers: Mapping[str, Worker], action: str, *, rounds: int, times: int) -> Figures:
    """Run rounds of each subject in turn; returns a list of `Worker.run`'s results for each."""
    found: Figures = {name: [] for name in workers}
    training = action == "train_step"
    for number in range(rounds):
        for name, subject in workers.items():
            settle = action if training else "predict_slices"
            found[name].append(subject.run(action, times, settle=settle, gemm=training))
            median = statistics.median(found[name][-1]["seconds"])
            print(f"round {number + 1}, {action}, {name}: {median:.3f} s", flush=True)
    return found


def figures(rounds: list[Figures], *, units: int) -> Figures:
    """Seconds, units a second (images, slices) and memory of one subject."""
    seconds = [value for one in rounds for value in one["seconds"]]
    gpu = rounds[-1]["peak_gpu_gb"]
    return {
        "seconds": spread(seconds),
        "per_second": round(units / statistics.median(seconds), 3),
        "peak_resident_gb": round(rounds[-1]["peak_resident_gb"], 3),
        "peak_gpu_gb": gpu and round(gpu, 3),
        "rounds": [one["seconds"] for one in rounds],
    }


def times_as_fast(found: Figures) -> Figures:
    """How many times as fast this package is as each other subject, round by round.

    PEFT is compared in the same precision; the original, which trains in float32, with both.
    """
    medians = {name: [statistics.median(one["seconds"]) for one in rounds] for name, rounds in found.items()}
    ratios: Figures = {name: {} for name in found if name.startswith("samed_peft ")}
    for ours, others in ratios.items():
        for other in (name for name in found if name not in ratios):
            if other.startswith("samed ") or other.split()[1] == ours.split()[1]:
                others[other] = spread([t / m for t, m in zip(medians[other], medians[ours], strict=True)])
    return ratios


def train(workers: Mapping[str, Worker], args: argparse.Namespace, gflop: float) -> Figures:
    """Measure training steps of all subjects, and of this package with its own loader."""
    first = {name: subject.run("train_step", fresh=True) for name, subject in workers.items()}
    found = take_turns(workers, "train_step", rounds=args.rounds, times=args.steps)
    subjects = {name: figures(rounds, units=args.batch_size) for name, rounds in found.items()}
    for name, one in subjects.items():
        one["first_loss"] = round(first[name]["values"][0], 5)
        one["gemm_gflops"] = spread([r["gemm_gflops"] for r in found[name]])
        shares = [gflop * args.batch_size / statistics.median(r["seconds"]) / r["gemm_gflops"] for r in found[name]]
        one["share_of_gemm_peak"] = spread(shares)
    for name, subject in workers.items():
        if name.startswith("samed_peft "):
            fed = subject.run("fed_step", args.steps * args.rounds, settle="fed_step")
            subjects[name]["share_waiting_for_data"] = round(sum(fed["values"]) / sum(fed["seconds"]), 4)
            subjects[name]["fed_seconds"] = spread(fed["seconds"])
    return {"subjects": subjects, "times_as_fast": times_as_fast(found)}


def predict(workers: Mapping[str, Worker], args: argparse.Namespace, action: str, slices: int) -> Figures:
    """Measure predictions of all subjects."""
    for subject in workers.values():
        subject.run("predict_slices", fresh=True)
    found = take_turns(workers, action, rounds=args.prediction_rounds, times=1)
    subjects = {name: figures(rounds, units=slices) for name, rounds in found.items()}
    return {"slices": slices, "subjects": subjects, "times_as_fast": times_as_fast(found)}


def profile(args: argparse.Namespace) -> Figures:
    """Profile this package and print the tables."""
    found: Figures = {}
    for precision in args.mixed_precision:
        subject = worker(args, "samed_peft", precision)
        subject.run("train_step")
        for kind in ("profile_step", "profile_prediction"):
            if kind == "profile_prediction":
                subject.run("start_prediction")
                subject.run("predict_slices")
            (one,) = subject.run(kind)["values"]
            print(f"\n{kind}, {PRECISIONS[precision]}\n\n{one.pop('table')}\n")
            print("\n".join(f"{name:<20} {share:6.1%}" for name, share in one["groups"].items()))
            found[f"{kind} {PRECISIONS[precision]}"] = one
        subject.close()
    return found


def table(title: str, part: Figures, *, training: bool) -> str:
    """Format one part as Markdown tables."""
    from samed_peft.evaluation.tables import markdown_table

    head = ["subject", "median s (range)", "images/s" if training else "slices/s", "peak GB"]
    head += ["GEMM peak", "first loss"] if training else []
    rows = []
    for name, one in part["subjects"].items():
        memory = one["peak_gpu_gb"] or one["peak_resident_gb"]
        row = [name, with_range(one["seconds"], 3), f"{one['per_second']:.2f}", f"{memory:.2f}"]
        row += [f"{one['share_of_gemm_peak']['median']:.0%}", f"{one['first_loss']:.4f}"] if training else []
        rows.append(row)
    ratios = part["times_as_fast"]
    others = sorted({other for found in ratios.values() for other in found})
    lines = [[ours, *(with_range(r[other], 2) if other in r else "" for other in others)] for ours, r in ratios.items()]
    compared = markdown_table(["times as fast as", *others], lines) if others else ""
    return f"### {title}\n\n{markdown_table(head, rows)}\n\n{compared}"


def parse() -> argparse.Namespace:
    """Options, with those that were left out filled in for the geometry."""
    parser = measure.options_parser(__doc__)
    add = parser.add_argument
    add("--geometry", choices=["vit_b", "vit_l", "vit_h", "tiny"], default="vit_b", help="of random weights")
    add("--base", help="SAM to use instead: Hub id, folder, Meta .pth or tiny-sam")
    add("--subjects", nargs="+", choices=SUBJECTS, help="all, but the original needs --samed_dir")
    add("--samed_dir", type=Path, help="checkout of hitachinsk/SAMed")
    add("--parts", nargs="+", choices=["training", "slices", "file"], default=["training", "slices", "file"])
    add("--method", choices=["lora"], default="lora")
    add("--rank", type=int, default=4)
    add("--mixed_precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    add("--gradient_checkpointing", action="store_true", help="of all but the original, which has none")
    add("--image_size", type=int, help="default: 512, or 64 for tiny")
    add("--input_size", type=int, help="low-resolution bottleneck of predictions; default: 224, or 28 for tiny")
    add("--batch_size", type=int, default=2, help="of training")
    add("--threads", type=int, default=2)
    add("--num_workers", type=int, default=2, help="that load slices, to see whether training waits for data")
    add("--learning_rate", type=float, default=1e-4)
    add("--steps", type=int, default=2, help="training steps a round, after one that is not timed")
    add("--rounds", type=int, default=5)
    add("--slices", type=int, default=4, help="to predict from memory")
    add("--prediction_rounds", type=int, help="default: at most 2")
    add("--scan", type=Path, help="to predict file to file, in Hounsfield units; default: a phantom")
    add("--scan_shape", nargs=3, type=int, help="slices, rows, columns of the phantom; default 20 512 512")
    add("--profile", action="store_true", help="print the operators that take samed_peft's time")
    add("--name", help="end of the result's file name; the geometry if not given")
    args = parser.parse_args()
    tiny = args.geometry == "tiny" or args.base == "tiny-sam"
    args.image_size = args.image_size or (64 if tiny else 512)
    args.input_size = args.input_size or (28 if tiny else 224)
    args.scan_shape = args.scan_shape or ([6, 96, 96] if tiny else [20, 512, 512])
    args.subjects = args.subjects or [name for name in SUBJECTS if name != "samed" or args.samed_dir]
    args.prediction_rounds = args.prediction_rounds or min(args.rounds, 2)
    if "samed" in args.subjects and not args.samed_dir:
        parser.error("the subject samed needs --samed_dir, a checkout of hitachinsk/SAMed")
    args.samed_dir = args.samed_dir and args.samed_dir.resolve()
    args.forked = tiny  # seconds count, and memory says nothing
    return args


def main() -> None:
    from throughput_inputs import write_inputs

    from samed_peft.io import write_json

    args = parse()
    os.environ |= QUIET
    # Only the last part of paths, which differ from machine to machine.
    plain = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("name", "results_dir")}
    plain["base"] = args.base and (Path(args.base).name if Path(args.base).exists() else args.base)
    result: Figures = measure.facts() | {"settings": plain}
    measure.processes(args.forked, preload=["throughput_peers", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        result |= measure.in_own_process(write_inputs, args, forked=args.forked)
        workers = start_workers(args)
        if "training" in args.parts:
            result["training"] = train(workers, args, result["step_gflop_per_image"])
        for subject in workers.values():
            subject.run("start_prediction")
        for part, number in (("slices", args.slices), ("file", result["scan_slices"])):
            if part in args.parts:
                result[part] = predict(workers, args, f"predict_{part}", number)
        for subject in workers.values():
            subject.close()
        if args.profile:
            result["profile"] = profile(args)
    titles = {"training": f"A training step of {args.batch_size} images", "slices": f"{args.slices} slices in memory"}
    titles["file"] = f"A scan of {result['scan_slices']} slices, file to file"
    print(f"\n{result['step_gflop_per_image']} GFLOP an image and step; {json.dumps(result['machine'])}\n")
    parts = [table(titles[part], result[part], training=part == "training") for part in titles if part in result]
    print("\n\n".join(parts))
    write_json(args.results_dir / f"throughput-{result['date']}-{args.name or args.geometry}.json", result)


if __name__ == "__main__":
    main()
