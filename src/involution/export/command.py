"""involution export: a checkpoint or a name as an ONNX file, a torch.export program or an AOTInductor package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .networks import exportable
from .programs import to_aoti, to_onnx, to_pt2, trace

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".aoti.pt2"}


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, 1 where the model cannot be exported, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="involution export", description=__doc__)
    parser.add_argument("model", help="a checkpoint of involution fit, or a timm name")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIXES))
    parser.add_argument("--output", type=Path, help="the file; by default the model's name with the format's suffix")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="default: the model's own")
    fixed = "fix batch and image size to one image of --image-size; by default both stay free"
    parser.add_argument("--static", action="store_true", help=fixed)
    parser.add_argument("--decompose", action="store_true", help="pt2: without this package's operators")
    parser.add_argument("--pretrained", action="store_true", help="a name's weights from timm; else it is untrained")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exit:  # argparse's exit
        return int(exit.code or 0)
    try:
        _export(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"involution export: {_first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    if options.decompose and options.to != "pt2":
        raise ValueError(f"decompose is for --to pt2, got --to {options.to}, which has no other operators anyway")
    made = exportable(options.model, options.pretrained)
    if made.static and options.to == "aoti":
        raise ValueError("--to must be onnx or pt2 for a detector, got aoti, which has no non-maximum suppression")
    file = options.output or Path(Path(options.model).stem + SUFFIXES[options.to])
    size = tuple(options.image_size or made.size)
    if min(size) < 1:
        raise ValueError(f"image-size must be positive, got {list(size)}")
    if made.static and any(length % made.multiple for length in size):
        raise ValueError(f"image-size must be multiples of {made.multiple} for a detector, got {list(size)}")
    dynamic = () if options.static or made.static else (0, 2, 3)
    example = torch.rand(2 if dynamic else 1, 3, *size)
    program = trace(made.network, example, dynamic, made.multiple)
    metadata = made.metadata | {"image_size": list(size)}
    if options.to == "onnx":
        to_onnx(program, file, made.outputs, metadata)
    elif options.to == "pt2":
        to_pt2(program, file, metadata, keep=not options.decompose)
    else:
        to_aoti(program, file, metadata)
    free = "any batch and image size" if dynamic else f"one image of {size[0]}x{size[1]}"
    if dynamic and made.multiple > 1:
        free += f" in multiples of {made.multiple}"
    print(f"wrote {file}: {free}; outputs {', '.join(made.outputs)}")


def _first_line(error: BaseException) -> str:
    """The exporters' errors are pages: the first line, of the error below where there is one."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
