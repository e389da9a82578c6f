"""The `samed` command. Heavy libraries are imported by the subcommand that needs them, so that help comes at once."""

import argparse
from collections.abc import Sequence

from samed_peft.errors import exit_on_error

_EXIT_CODES = "exit codes: 0 done, 2 wrong input"


def _convert(args: argparse.Namespace) -> None:
    from samed_peft.conversion import convert_sam, convert_samed

    if args.base is None:
        convert_sam(args.checkpoint, args.output, image_size=args.image_size)
        return
    options = {"input_size": args.input_size, "class_names": args.class_names, "orientation": args.orientation}
    size = {} if args.image_size is None else {"image_size": args.image_size}
    convert_samed(args.checkpoint, args.base, args.output, dtype=args.dtype, **size, **options)


def _export(args: argparse.Namespace) -> None:
    from samed_peft import conversion

    export = {
        "samed": conversion.export_samed,
        "merged": conversion.export_merged,
        "peft-fused": conversion.export_peft_fused,
        "onnx": conversion.export_onnx,
    }[args.format]
    export(args.adapter, args.output, base=args.base)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "convert",
        help="SAMed's .pth -> adapter folder; Meta's .pth -> SamModel folder",
        description="Without --base, a SAM in Meta's format becomes a folder for SamModel.from_pretrained. With it, a "
        "checkpoint of SAMed or SAMed_s becomes an adapter of that base.",
        epilog="samed convert --checkpoint sam_vit_b_01ec64.pth --output sam_vit_b\n"
        "samed convert --checkpoint epoch_159.pth --base sam_vit_b_01ec64.pth --output samed --input_size 224\n\n"
        + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="the .pth; of a SAM also a Hub id or folder, to resize it")
    parser.add_argument("--base", help="SAM the checkpoint was trained on: Hub id, folder or Meta .pth")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--image_size", type=int, help="pixels the encoder sees; SAMed's default is 512")
    parser.add_argument("--input_size", type=int, help="bottleneck at prediction; SAMed's test uses 224")
    parser.add_argument("--class_names", type=_names, help="a,b,c; by default Synapse's eight organs")
    parser.add_argument("--orientation", help="axis codes of the training scans; raw BTCV is LAS")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the file")
    parser.set_defaults(run=_convert)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="adapter -> SAMed's .pth, plain SamModel, stock PEFT adapter, or ONNX",
        description="samed: the .pth that SAMed's test.py loads. merged: a SamModel folder with the adapter in its "
        "weights. peft-fused: an adapter that stock PEFT attaches to a plain SamModel. onnx: one file, checked.",
        epilog="samed export --adapter runs/synapse/adapter --output epoch_159.pth --format samed\n\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id")
    parser.add_argument("--output", required=True, help="file (samed, onnx) or folder (merged, peft-fused)")
    parser.add_argument("--format", required=True, choices=("samed", "merged", "peft-fused", "onnx"))
    parser.add_argument("--base", help="its SAM, where it is not to be had under its recorded name")
    parser.set_defaults(run=_export)


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="samed", description="SAMed on PEFT and Transformers.", epilog=_EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_export(commands)
    args = parser.parse_args(arguments)
    args.run(args)
