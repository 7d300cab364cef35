"""`fullarc quantize CHECKPOINT OUT`: write a checkpoint with INT4 or INT8 weights (compressed-tensors)."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fullarc.config.errors import FullarcError

SCHEMES = {
    "w4a16": "experts in 4 bits, what they read as it is",
    "w8a8": "experts, attention and dense layers in 8 bits, and so what they read, token by token",
    "w4a8": "the same with routed experts in 4 bits",
}
ROWS, ROW = 128, 256
"""How many rows, of how many tokens, integers are calibrated on."""


def main(argv: Sequence[str]) -> int:
    """The verb."""
    from fullarc.evals.stage import trained_rows
    from fullarc.model import QuantScheme, quantize_checkpoint
    from fullarc.model.compressed import KINDS
    from fullarc.model.quant import quantize, quantize_best
    from fullarc.rollout.serve import resolve_model

    parser = argparse.ArgumentParser(
        prog="fullarc quantize",
        description="Write a checkpoint with quantised weights (compressed-tensors).",
        epilog="Schemes: " + "; ".join(f"{name}: {told}" for name, told in SCHEMES.items()) + ".",
    )
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT", help="checkpoint or run folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument(
        "--scheme", choices=list(SCHEMES), help="in place of --bits, --what and --rest; see below"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="default: 4")
    parser.add_argument(
        "--group", type=int, help="weights of a row that share a scale; 0 = the whole row, and all there is where "
        "inputs are rounded too; default: 32"
    )  # fmt: skip
    parser.add_argument("--what", nargs="+", choices=list(KINDS), help="kinds of matrices; default: experts")
    parser.add_argument(
        "--rest", type=int, choices=(0, 4, 8), metavar="BITS",
        help="bits of the other kinds, one scale a row; default: 0, left as they are",
    )  # fmt: skip
    parser.add_argument(
        "--search", action="store_true", help="scales of least squared error, not of no clamping"
    )
    parser.add_argument("--rotate", action="store_true", help="spread outliers of latents and values first")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="let integers make up for each other's errors on rows that the checkpoint's run was trained on (GPTQ)",
    )  # fmt: skip
    parser.add_argument("--wide", action="store_true", help="with w4a8: 4 bits in a byte, for vLLM's experts")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    folder, out = resolve_model(arguments.folder), arguments.out
    _check_out(folder, out, arguments.overwrite)
    if (arguments.group or 0) < 0:
        parser.error("--group must be 0 or more")
    if arguments.scheme and (arguments.bits or arguments.what or arguments.rest is not None):
        parser.error("--scheme says what --bits, --what and --rest would")
    if arguments.wide and arguments.scheme != "w4a8":
        parser.error("--wide is for --scheme w4a8")

    rows = trained_rows(folder, ROWS, ROW) if arguments.calibrate else []
    if arguments.calibrate and not rows:
        raise FullarcError(
            f"{folder} belongs to no run with rows to calibrate on.", "Give a run's checkpoint."
        )

    tokens = arguments.scheme in ("w8a8", "w4a8")
    group = (0 if tokens else 32) if arguments.group is None else arguments.group
    first = QuantScheme(8 if arguments.scheme == "w8a8" else arguments.bits or 4, group, tokens)
    rest = QuantScheme(8 if tokens else arguments.rest or 0, 0, tokens)
    plan = {kind: first if kind in (arguments.what or ["experts"]) else rest for kind in KINDS}
    reports = quantize_checkpoint(
        folder, out, {kind: scheme for kind, scheme in plan.items() if scheme.bits},
        arguments.wide, quantize_best if arguments.search else quantize, arguments.rotate, rows,
    )  # fmt: skip
    before, after = (sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (folder, out))
    if arguments.json:
        sizes = {"checkpoint": str(out), "bytes_before": before, "bytes_after": after}
        print(json.dumps(sizes | {"kinds": [asdict(report) for report in reports]}, indent=1))
        return 0
    for report in reports:
        print(
            f"{report.kind:10} {report.matrices:6} matrices in {report.bits} bits  {_mb(report.bytes_before)} -> "
            f"{_mb(report.bytes_after)} MB, {report.ratio:.3f} of bf16  relative error {report.error:.4f}"
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
