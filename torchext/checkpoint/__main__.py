"""The command line: `python -m torchext.checkpoint inspect|convert|verify PATH`.

Exit status: 0 if all is well, 1 if a problem was found, 2 for wrong arguments, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import Conversion, Inspection, Verification, convert, inspect, verify
from .files import CheckpointError
from .plan import EXPERTS, FORMATS

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    number = text.rstrip("KMGBkmgb")
    unit = text[len(number) :].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"must be such as 5GB (got {text!r})")
    return int(float(number) * _UNITS[unit])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torchext.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("path", help="a folder with safetensors files, or one file")
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument(
        "--weight-block-size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
        help="of a block, in place of config.json's",
    )  # fmt: skip
    shared.add_argument(
        "--gate-up", choices=["fused", "apart"],
        help="whether gate and up of 3-D experts share blocks, where shapes do not tell",
    )  # fmt: skip

    commands.add_parser("inspect", parents=[shared], help="say what a checkpoint is")

    check = commands.add_parser("verify", parents=[shared], help="check scales against weights")
    check.add_argument("--original", help="the wide checkpoint to compare with")
    check.add_argument("--min-sqnr", type=float, default=25.0, help="in dB (25)")

    to = commands.add_parser("convert", parents=[shared], help="write another format")
    to.add_argument("target", help="the folder to make")
    to.add_argument("--to", required=True, choices=FORMATS)
    to.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", dest="modules_to_not_convert",
        help="modules that stay wide, by name segments and globs; may be given several times",
    )  # fmt: skip
    to.add_argument("--pow2-scale", action="store_true", help="scales that are powers of two")
    to.add_argument("--wide-dtype", choices=_DTYPES, help="round every tensor to this first")
    to.add_argument("--experts", choices=EXPERTS, default="keep")
    to.add_argument("--requantize", action="store_true", help="allow rounding a second time")
    for command in (check, to):
        command.add_argument(
            "--allow-unmatched", action="store_true", help="patterns may match nothing"
        )
    to.add_argument("--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE")
    return parser


def _run(args: argparse.Namespace) -> tuple[Inspection | Verification | Conversion, int]:
    block = tuple(args.weight_block_size) if args.weight_block_size else None
    if args.command == "inspect":
        found = inspect(args.path, weight_block_size=block, gate_up=args.gate_up)
        return found, 1 if found.problems else 0
    if args.command == "verify":
        verified = verify(
            args.path, original=args.original, min_sqnr=args.min_sqnr,
            allow_unmatched=args.allow_unmatched,
            weight_block_size=block, gate_up=args.gate_up,
        )  # fmt: skip
        return verified, 0 if verified.ok else 1
    converted = convert(
        args.path, args.target, to=args.to, pow2_scale=args.pow2_scale,
        modules_to_not_convert=args.modules_to_not_convert,
        wide_dtype=_DTYPES.get(args.wide_dtype), experts=args.experts, gate_up=args.gate_up,
        weight_block_size=block, requantize=args.requantize,
        allow_unmatched=args.allow_unmatched, max_shard_bytes=args.max_shard_size,
    )  # fmt: skip
    return converted, 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        result, status = _run(args)
    except (CheckpointError, ImportError, KeyboardInterrupt, OSError, ValueError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        notes = getattr(error, "__notes__", [])
        print("\n".join(["interrupted" if interrupted else str(error), *notes]), file=sys.stderr)
        return 130 if interrupted else 1
    print(result.to_json(indent=2) if args.json else result)
    return status


if __name__ == "__main__":
    sys.exit(main())
