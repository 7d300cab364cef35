"""`fullarc quantize CHECKPOINT OUT`: write a checkpoint with INT4 experts, in the form of compressed-tensors."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fullarc.config.errors import FullarcError


def main(argv: Sequence[str]) -> int:
    """The verb."""
    from fullarc.model import QuantScheme, quantize_checkpoint
    from fullarc.model.compressed import KINDS
    from fullarc.rollout.serve import resolve_model

    parser = argparse.ArgumentParser(
        prog="fullarc quantize", description="Write a checkpoint with quantised weights (compressed-tensors)."
    )
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT", help="checkpoint or run folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument(
        "--group", type=int, default=32, help="weights of a row that share a scale; 0 = the whole row"
    )
    parser.add_argument(
        "--what",
        nargs="+",
        choices=list(KINDS),
        default=["experts"],
        help="kinds of matrices; default: experts",
    )
    parser.add_argument(
        "--rest", type=int, choices=(0, 4, 8), default=0, metavar="BITS",
        help="bits of the other kinds, one scale a row; default: 0, left as they are",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    folder, out = resolve_model(arguments.folder), arguments.out
    _check_out(folder, out, arguments.overwrite)
    if arguments.group < 0:
        parser.error("--group must be 0 or more")

    first, rest = QuantScheme(arguments.bits, arguments.group), QuantScheme(arguments.rest, 0)
    plan = {kind: first if kind in arguments.what else rest for kind in KINDS}
    reports = quantize_checkpoint(folder, out, {kind: scheme for kind, scheme in plan.items() if scheme.bits})
    before, after = (sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (folder, out))
    if arguments.json:
        sizes = {"checkpoint": str(out), "bytes_before": before, "bytes_after": after}
        print(json.dumps(sizes | {"kinds": [asdict(report) for report in reports]}, indent=1))
        return 0
    for report in reports:
        print(
            f"{report.kind:10} {report.matrices:6} matrices in {report.bits} bits  {_mb(report.bytes_before)} -> "
            f"{_mb(report.bytes_after)} MB  relative error {report.error:.4f}"
        )
    print(f"{out}: {_mb(before)} -> {_mb(after)} MB")
    return 0


def _check_out(folder: Path, out: Path, overwrite: bool) -> None:
    """Raise FullarcError if writing `out` could lose something."""
    if out.resolve() == folder.resolve():
        raise FullarcError(f"{out} is the checkpoint itself.", "Give a new folder.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not all((out / name).is_file() for name in ("config.json", "manifest.json")):
        raise FullarcError(f"{out} exists and is not a checkpoint.", "Give a new folder.")
    if not overwrite:
        raise FullarcError(f"{out} exists.", "Give a new folder, or --overwrite to replace it.")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
