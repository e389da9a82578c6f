"""`samed predict`: segment scans."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from samed_peft.cli.options import Commands, new_command
from samed_peft.errors import InputError, SomeCasesFailedError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

    from samed_peft.prediction import Outcome, PredictionOptions, Scan
    from samed_peft.prediction.records import AdapterSource

_DESCRIPTION = """\
Segment a scan, or every scan in a folder: .nii.gz .nii .nrrd .mha .npy.h5 .npz .png .tif .tiff .jpg .jpeg, and folders
with a DICOM series, of single slices or multi-frame files; a .dcm file alone if it holds the whole scan. Masks have the
scans' own grids and the names of the classes. If the adapter was trained on files with nnU-Net's channel suffixes,
_0000, _0001 ..., or it does not know and all names of a folder end so, one channel is segmented and named without the
suffix. Finished scans are skipped."""

_EPILOG = """\
samed predict --adapter runs/synapse/adapter --input scan.nii.gz --output mask.nii.gz
samed predict --adapter runs/synapse/adapter --input scans --output masks --overlay
samed predict --adapter runs/fold0/adapter runs/fold1/adapter --input scans --output masks --save_probabilities
accelerate launch --num_processes 4 -m samed_peft predict --adapter NAME/REPOSITORY --input scans --output masks

exit codes: 0 done, 1 some scans failed or may have been skipped and the others are done, 2 wrong input"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(
        commands, "predict", help="segment scans with an adapter", description=_DESCRIPTION, epilog=_EPILOG
    )
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    several = "adapter folder or Hub id; of several, of the same classes, the probabilities are averaged"
    add("--adapter", required=True, nargs="+", metavar="ADAPTER", help=several)
    add("--input", type=Path, required=True, metavar="PATH", help="scan, DICOM folder or folder of scans")
    masks = "folder for CASE.nii.gz (.nrrd, .mha and pictures keep their kind), or the name of a single scan's mask"
    add("--output", type=Path, required=True, metavar="PATH", help=masks)
    add("--base", help="base SAM, if it is not at the recorded location")
    add("--revision", help="branch, tag or commit of an adapter on the Hub")
    add("--batch_size", type=int, default=8, metavar="N", help="slices per forward pass, %(default)s by default")
    add("--device", help="cpu, cuda, cuda:1 or mps; Accelerate's choice by default")
    precisions = ("float32", "bfloat16", "float16")
    add("--dtype", choices=precisions, help="precision; float32 or Accelerate's by default")
    add("--series", metavar="UID", help="of a DICOM folder with several series: the SeriesInstanceUID to segment")
    channels = "of 4-D scans or nnU-Net's names, from 0; the adapter's by default, several if it sees several together"
    add("--channel", type=int, nargs="+", metavar="N", help=channels)
    flag("--flips", help="average over flips of each slice, in four times the time")
    flag("--keep_largest", help="keep the largest connected part of each class")
    recorded = "average, smooth and clean up as the adapter records, as found on validation"
    add("--postprocess", action=argparse.BooleanOptionalAction, default=True, help=recorded)
    flag("--save_probabilities", help="also write probabilities/CASE.nii.gz, 4-D: one volume a class, background first")
    add("--probability_bits", type=int, choices=(8, 16), help="of each stored probability, 8 by default")
    tiles = "cut slices into overlapping tiles of the encoder's size and do not resize; adapters of tiles do so anyway"
    flag("--tile", help=tiles)
    flag("--overlay", help="also write overlays/CASE.png, the mask over the scan")
    flag("--dicom_seg", help="masks of DICOM series as DICOM SEG, CASE.dcm, instead of NIfTI")
    flag("--overwrite", help="segment finished scans again, and replace or remove their probabilities")
    flag("--compile", help="compile the model first, in a minute or more; no gain for SAM's ViT-B on CPUs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Segment the scans and say what was written."""
    from samed_peft import prediction
    from samed_peft.io import require_highdicom
    from samed_peft.prediction.records import common_channel, require_same_adapters
    from samed_peft.prediction.scans import warn_of_storage_order

    options = _options(args)
    sources = prediction.list_scans(args.input, series=args.series)
    if args.dicom_seg:
        require_highdicom()
    # Check inputs and outputs before a large base is loaded.
    kind = {"dicom_seg": args.dicom_seg, "series": args.series}
    first = prediction.plan_masks(sources, args.output, channel=args.channel, **kind)[0]
    _require_outputs(first, options)
    accelerator = _new_accelerator(args)
    adapters = prediction.find_adapters(args.adapter, revision=args.revision)
    channel, channel_files = common_channel(adapters, args.channel)
    if accelerator.is_main_process:
        for orientation in {adapter.config.orientation for adapter in adapters}:
            warn_of_storage_order(sources, orientation)
    scans = prediction.plan_masks(sources, args.output, channel=channel, channel_files=channel_files, **kind)
    if not args.overwrite and any(scan.mask.is_file() for scan in scans):
        require_same_adapters(first.mask.parent, adapters)
    place = {name: vars(args)[name] for name in ("base", "dtype", "device")}
    models = [prediction.load_segmenter(one.folder, accelerator=accelerator, **place) for one in adapters]
    if args.tile:
        models = [prediction.with_tiles(model) for model in models]
    accelerator.wait_for_everyone()  # each has read the record before it changes
    if accelerator.is_main_process:
        _tell_averaged(adapters)
    outcome = prediction.predict_files(models, scans, options=options, accelerator=accelerator, adapters=adapters)
    accelerator.end_training()
    # Other processes exit with 0: if one failed, a launcher would stop the main process before it has reported.
    if accelerator.is_main_process:
        used = {path for scan in scans for path in (scan.source, *scan.further)}
        left_out = _tell_other_channels(len(set(sources) - used), len(sources))
        outputs = [args.output, first.overlay.parent, first.probabilities.parent]
        skipped = "" if args.series else _tell_skipped(args.input, sources, outputs)
        _report(outcome, args.output)
        _require_all_done(left_out if channel is None else "", skipped, bool(channel_files))


def _new_accelerator(args: argparse.Namespace) -> "Accelerator":
    from accelerate import Accelerator

    from samed_peft.models.launch import require_precision, warn_of_one_process

    accelerator = Accelerator(cpu=args.device == "cpu")
    warn_of_one_process(accelerator)
    if args.dtype is None:  # before a large base is loaded
        require_precision(accelerator)
    return accelerator


def _options(args: argparse.Namespace) -> "PredictionOptions":
    from samed_peft import prediction

    names = ("batch_size", "dtype", "flips", "keep_largest", "postprocess", "save_probabilities", "probability_bits")
    return prediction.PredictionOptions(
        **{name: vars(args)[name] for name in (*names, "overlay", "overwrite", "compile")}
    )


def _require_outputs(first: "Scan", options: "PredictionOptions") -> None:
    """Refuse folders that cannot be written."""
    from samed_peft.io import FolderKind, require_replaceable

    wanted = [(True, first.mask), (options.overlay, first.overlay), (options.save_probabilities, first.probabilities)]
    for folder in [file.parent for is_wanted, file in wanted if is_wanted]:
        require_replaceable(folder, FolderKind(in_place=True))


def _tell_averaged(adapters: "Sequence[AdapterSource]") -> None:
    if len(adapters) > 1:
        print(printable(f"averaging {len(adapters)} adapters: {', '.join(one.source for one in adapters)}"))


def _tell_other_channels(count: int, total: int) -> str:
    """Say how many files were left out for their channel, if any."""
    if not count:
        return ""
    told = f"{count} of {total} files are other channels, by their names, and left out"
    print(told)
    return told


def _tell_skipped(source: Path, scans: list[Path], outputs: list[Path]) -> str:
    """List the files skipped beside the scans; returns the names of those that may hold scans."""
    from samed_peft.prediction.scans import skipped_files

    maybe, others = skipped_files(source, scans, outputs)
    for paths, reason in ((others, "not scans"), (maybe, "but may hold scans")):
        if paths:
            print(printable(f"skipped, {reason}: {_listed(paths)}"))
    return _listed(maybe)


def _require_all_done(left_out: str, skipped: str, has_one_channel: bool) -> None:
    """Raise if scans may have been left out that users would miss."""
    if left_out:
        raise SomeCasesFailedError(
            f"{left_out}, but the adapter knows {'a single channel' if has_one_channel else 'no channels'}; give "
            "--channel 0 if that is right, or rename files that are cases, so that their names do not end in _0000, "
            "_0001 and so on"
        )
    if skipped:
        raise SomeCasesFailedError(
            f"{skipped} may hold scans, but were skipped; convert such files to a format that is read, give "
            "such folders as --input, or move them elsewhere"
        )


def _listed(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:5]) + f" and {len(paths) - 5} more" * (len(paths) > 5)


def _report(outcome: "Outcome", output: Path) -> None:
    """Print the result of each scan; raise if one failed."""
    total = len(outcome.written) + len(outcome.skipped) + len(outcome.failed)
    if total == 1 and outcome.failed:
        raise InputError(next(iter(outcome.failed.values())))
    for case, reason in outcome.failed.items():
        print(printable(f"failed: {case}: {reason}"), file=sys.stderr)
    line = f"{len(outcome.written)} mask{'s' * (len(outcome.written) != 1)} written to {output}"
    if outcome.skipped:
        line += f"; {len(outcome.skipped)} finished earlier and skipped, --overwrite segments them again"
    print(printable(line))
    if len(outcome.failed) == total:
        raise SomeCasesFailedError(f"all {total} scans failed; no mask was written")
    if outcome.failed:
        others = "are written" if outcome.written else "were written earlier"
        raise SomeCasesFailedError(f"{len(outcome.failed)} of {total} scans failed; the other masks {others}")
