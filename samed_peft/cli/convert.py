"""`samed convert`: convert checkpoints of other programs."""

import argparse

from samed_peft.cli.options import Commands, names, new_command
from samed_peft.errors import InputError, printable

_EPILOG = """\
samed convert --checkpoint sam_vit_b_01ec64.pth --output sam_vit_b
samed convert --checkpoint epoch_159.pth --base sam_vit_b_01ec64.pth --output samed --input_size 224

exit codes: 0 done, 2 wrong input"""


def add_parser(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = new_command(
        commands,
        "convert",
        help="SAMed's .pth -> adapter folder; Meta's .pth -> SamModel folder",
        description="Without --base, a SAM in Meta's format becomes a folder for SamModel.from_pretrained. With it, a\n"
        "checkpoint of SAMed or SAMed_s becomes an adapter of that base.",
        epilog=_EPILOG,
    )
    parser.add_argument("--checkpoint", required=True, help="the .pth; for a SAM also a Hub id or folder")
    parser.add_argument("--base", help="SAM the checkpoint was trained on: Hub id, folder or Meta .pth")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--image_size", type=int, help="pixels the encoder sees; SAMed's default is 512")
    parser.add_argument("--input_size", type=int, help="bottleneck at prediction; SAMed's test uses 224")
    parser.add_argument("--class_names", type=names, help="a,b,c; by default Synapse's eight organs")
    parser.add_argument("--orientation", help="axis codes of the training scans; for Synapse's classes raw BTCV's, LAS")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored weights; default float32"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert one checkpoint."""
    from samed_peft.conversion import convert_sam, convert_samed
    from samed_peft.models.bases import require_base

    if args.base is None:
        given = [f"--{name}" for name in ("input_size", "class_names", "orientation", "dtype") if vars(args)[name]]
        if given:
            raise InputError(
                f"{', '.join(given)} belong to an adapter: give --base as well, or leave them out for a SAM"
            )
        require_base(args.checkpoint, "checkpoint")
        convert_sam(args.checkpoint, args.output, image_size=args.image_size)
        print(printable(f"SAM written to {args.output}"))
        return
    options = {"input_size": args.input_size, "class_names": args.class_names, "orientation": args.orientation}
    size = {} if args.image_size is None else {"image_size": args.image_size}
    config = convert_samed(args.checkpoint, args.base, args.output, dtype=args.dtype or "float32", **size, **options)
    print(printable(f"adapter written to {args.output}"))
    if config.orientation is None:
        print(
            "the training scans' orientation is unknown, so slices will follow the order in which a scan is stored; if "
            "you know it, convert again with --orientation"
        )
