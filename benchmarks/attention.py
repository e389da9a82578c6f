"""SAM's attention alone: this package's CPU kernel beside PyTorch's fused kernel and Transformers' SDPA attention.

    python benchmarks/attention.py              # ViT-B at 512 and 1024 pixels, about three minutes on two idle cores
    python benchmarks/attention.py --quick      # tiny sizes, seconds: to see that it works

All attend on the same queries, keys and values, projections left out, and take turns within a round; ratios are taken
within a round too. Gradients are those of LoRA finetuning: of queries, keys, values and padding, not of the frozen
relative positions. "encoder" adds up the 8 windowed and 4 global layers of ViT-B. Peak memory is the memory that one
forward and backward pass adds to the process. Results are compared with the same attention in float64. Prints Markdown;
writes one JSON to benchmarks/results. Memory is read from /proc, so this runs on Linux.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import numpy as np
import torch
from measure import Action, spread, with_range
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from samed_peft.evaluation.tables import markdown_table
from samed_peft.io import write_json
from samed_peft.models.attention import fused_attention
from samed_peft.models.cpu_attention import TiledAttention

SUBJECTS = ("samed_peft", "fused", "transformers")
STEPS = ("forward", "forward and backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATCH = 16
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """One kind of attention layer: tokens and window per side, heads, their size, and how many layers are of it."""

    kind: str
    grid: int
    window: int
    heads: int
    dim: int
    count: int


def drawn(layer: Layer, *, batch_size: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Draw inputs as `TiledAttention` takes them, and last the gradient (B, H, W, heads, d) of its output.

    Padding is zero, as without biases: Transformers pads tokens and projects them afterwards.
    """
    rng = torch.Generator().manual_seed(0)
    shape = (batch_size, layer.grid, layer.grid, layer.heads, layer.dim)
    query, key, value, grad_output = (torch.randn(shape, generator=rng) for _ in range(4))
    table = torch.randn(2 * (2 * layer.window - 1), layer.dim, generator=rng)
    pads = [torch.zeros(layer.heads, layer.dim) if layer.grid % layer.window else None for _ in range(2)]
    return cast([query, key, value, *pads, table, grad_output], dtype)


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast tensors; all but the table and the output's gradient need gradients."""
    changed = [None if tensor is None else tensor.detach().to(dtype) for tensor in tensors]
    return [tensor if tensor is None else tensor.requires_grad_(i < 5) for i, tensor in enumerate(changed)]


def subjects(layer: Layer, table: Tensor) -> dict[str, Attention]:
    """Build the compared functions of query, key, value, the two paddings and the table."""
    config = SamVisionConfig(hidden_size=layer.heads * layer.dim, num_attention_heads=layer.heads)
    config._attn_implementation = "sdpa"
    theirs = SamVisionLayer(config, layer.window)
    theirs.attn.qkv = theirs.attn.proj = nn.Identity()
    rows, columns = (table.detach() * layer.dim**-0.5).chunk(2)
    theirs.attn.rel_pos_h.data, theirs.attn.rel_pos_w.data = rows.flip(0), columns.flip(0)
    theirs.requires_grad_(False)

    def transformers(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> Tensor:
        tokens = torch.cat([query.flatten(3), key.flatten(3), value.flatten(3)], dim=-1)
        windows, padded = theirs.window_partition(tokens, layer.window)
        output = theirs.window_unpartition(theirs.attn(windows)[0], layer.window, padded, query.shape[1:3])
        return output.unflatten(-1, (layer.heads, layer.dim))

    ours, fused = partial(TiledAttention.apply, layer.window), partial(fused_attention, layer.window)
    return {"samed_peft": ours, "fused": fused, "transformers": transformers}


def backward(attend: Attention, tensors: list[Tensor | None]) -> list[Tensor]:
    """Return output and gradients of queries, keys, values and, if the subject takes it, padding."""
    *inputs, grad_output = tensors
    output = attend(*inputs)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad_output, allow_unused=True)]


def largest_difference(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Largest differences of output and gradients from float64, as shares of the largest number there."""
    apart = [
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, exact, strict=True)
        if one is not None
    ]
    return {"output": apart[0], "gradients": max(apart[1:])}


def peak_mb(action: Action) -> float:
    """Peak memory that a call adds, in a new thread because this package keeps scratch memory for each thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(measure.reset_peak).result()
        before = measure.peak_resident_gb()
        thread.submit(action).result()
        return round(1e3 * (measure.peak_resident_gb() - before), 1)


def measured(layer: Layer, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Measure differences from float64, peak memory, and seconds of every round, for all subjects."""
    tensors = drawn(layer, batch_size=args.batch_size, dtype=dtype)
    exact = backward(partial(fused_attention, layer.window), cast(tensors, torch.float64))
    calls: dict[tuple[str, str], Action] = {}
    found: dict[str, Any] = {}
    for name, attend in subjects(layer, tensors[-2]).items():
        calls[name, STEPS[0]] = torch.no_grad()(partial(attend, *tensors[:-1]))
        calls[name, STEPS[1]] = partial(backward, attend, tensors)
        found[name] = {"peak_mb": peak_mb(calls[name, STEPS[1]])}  # these calls warm up as well
        found[name]["largest_difference"] = largest_difference(backward(attend, tensors), exact)
        found[name]["seconds"] = {step: [] for step in STEPS}
    for _ in range(args.rounds):
        for (name, step), call in calls.items():
            found[name]["seconds"][step].append(measure.seconds_of(call)[0])
    return found


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Summarise the seconds of each subject's rounds, and how many times as fast this package is."""
    ours = np.array(seconds["samed_peft"])
    ratios = {name: spread((seconds[name] / ours).tolist()) for name in SUBJECTS[1:]}
    return {"seconds": {name: spread(rounds) for name, rounds in seconds.items()}, "times_as_fast": ratios}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all sizes and types; one entry for each with its layers, and each step's comparisons."""
    results = []
    for size, dtype in itertools.product(args.image_sizes, DTYPES):
        window, heads, dim = (3, 2, 16) if args.quick else (14, 12, 64)
        grid = size // PATCH
        kinds = [Layer("windowed", grid, window, heads, dim, 8), Layer("global", grid, grid, heads, dim, 4)]
        found = {layer.kind: measured(layer, DTYPES[dtype], args) for layer in kinds}
        steps = {}
        for step in STEPS:
            parts = {kind: {name: one["seconds"][step] for name, one in found[kind].items()} for kind in found}
            counts = [layer.count for layer in kinds]
            parts["encoder"] = {
                name: np.dot(counts, [parts[layer.kind][name] for layer in kinds]).tolist() for name in SUBJECTS
            }
            steps[step] = {part: compare(seconds) for part, seconds in parts.items()}
            print(f"{size} pixels, {dtype}, {step}: {steps[step]['encoder']['times_as_fast']}", flush=True)
        results.append({"image_size": size, "dtype": dtype, "layers": found, "steps": steps})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """All comparisons as Markdown: median milliseconds with their range, ratios, and peak memory."""
    rows = []
    for one, step in itertools.product(results, STEPS):
        for part, compared in one["steps"][step].items():
            times = [with_range(compared["seconds"][name], 1, scale=1e3) for name in SUBJECTS]
            ratios = [with_range(compared["times_as_fast"][name], 2) for name in SUBJECTS[1:]]
            peaks = [one["layers"][part][name]["peak_mb"] for name in SUBJECTS] if part != "encoder" else []
            memory = " / ".join(f"{peak:.0f}" for peak in peaks) if step == STEPS[1] else ""
            rows.append([f"{one['image_size']}, {one['dtype']}, {step}, {part}", *times, *ratios, memory])
    head = ["pixels, type, pass, layers", *(f"{name}, ms" for name in SUBJECTS)]
    head += [*(f"{name} / samed_peft" for name in SUBJECTS[1:]), "peak MB of each"]
    return markdown_table(head, rows)


def main() -> None:
    parser = measure.options_parser(__doc__)
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[512, 1024], help="pixels per side")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny encoder at 128 pixels, one round")
    parser.add_argument("--name", default="vit_b", help="end of the result's file name")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(image_sizes=[128], rounds=1)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("name", "results_dir")}
    result = measure.facts() | {"settings": settings, "results": run(args)}
    ratios = [step["encoder"]["times_as_fast"] for one in result["results"] for step in one["steps"].values()]
    result["overall"] = {
        name: round(statistics.geometric_mean(ratio[name]["median"] for ratio in ratios), 3) for name in SUBJECTS[1:]
    }
    print("\n" + table(result["results"]))
    for name, ratio in result["overall"].items():
        print(f"\nThe whole encoder, mean over sizes, types and passes: {ratio:.2f} times as fast as {name}")
    write_json(args.results_dir / f"attention-{result['date']}-{args.name}.json", result)


if __name__ == "__main__":
    main()
