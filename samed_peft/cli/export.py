"""`samed export`: adapters for other programs."""

import argparse

from samed_peft.cli.options import Commands, new_command

_FORMATS = {
    "samed": "the .pth that SAMed's test.py loads",
    "merged": "a SamModel folder with the adapter in its weights",
    "peft-fused": "an adapter that stock PEFT attaches to a plain SamModel",
    "onnx": "one file, checked",
}

_EPILOG = """\
samed export --adapter runs/synapse/adapter --output epoch_159.pth --format samed

exit codes: 0 done, 2 wrong input"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(
        commands,
        "export",
        help="adapter -> SAMed's .pth, plain SamModel, stock PEFT adapter, or ONNX",
        description="\n".join(f"{name}: {text}" for name, text in _FORMATS.items()),
        epilog=_EPILOG,
    )
    parser.add_argument("--adapter", required=True, help="adapter folder or Hub id")
    parser.add_argument("--output", required=True, help="new file (samed, onnx) or folder (merged, peft-fused)")
    parser.add_argument("--format", required=True, choices=_FORMATS)
    parser.add_argument("--base", help="base SAM, if it is not at the recorded location")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export one adapter."""
    from samed_peft.conversion import EXPORTS

    difference = EXPORTS[args.format](args.adapter, args.output, base=args.base)
    checked = "" if difference is None else f"; logits differ from PyTorch's by {difference:.1g} at most"
    print(f"{args.format} written to {args.output}{checked}")
