"""`involution show MODEL IMAGE...`: pictures of the kernels that a network generates, and their statistics."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..engine.images import read_image
from ..engine.pictures import picture_names
from .layers import last_of_stages, select, table
from .sheet import DRAWINGS, Picture, Pixel, Shown, draw_sheet, save
from .subject import Subject, receptive_field, subject
from .view import Grid, View


def main(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: after the verb.

    Raises:
        FileNotFoundError: the model looks like a file that does not exist.
        ValueError: the model has no involution, an image cannot be read, or an option does not fit.
        SystemExit: an argument is wrong or missing (the message is on stderr).
    """
    if "--web" in arguments:
        from .web import main as web

        web([argument for argument in arguments if argument != "--web"])
        return
    options = _parser().parse_args(arguments)
    if options.output.resolve() in {file.resolve().parent for file in options.images}:
        raise ValueError(
            f"output must be another folder than the images', which pictures would replace, got {options.output}"
        )
    images = [read_image(file) for file in options.images]
    for file, image in zip(options.images, images, strict=True):
        _check_inside(options.at, image, file)
    model = subject(options.model, options.pretrained)
    chosen = chosen_layers(model, options.layers)
    print(f"{model.title}: {len(model.layers())} involutions, {len(chosen)} of them drawn")
    for file, image, name in zip(options.images, images, picture_names(options.images), strict=True):
        _show(model, chosen, file, image, options.output / Path(name).stem, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="involution show",
        description="Draws the kernels that a network generates for images, and prints statistics of every involution.",
    )
    parser.add_argument("model", help="a checkpoint of involution fit, or a timm name (random weights)")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--pretrained", action="store_true", help="a name's weights from timm, instead of random ones")
    parser.add_argument("--web", action="store_true", help="a page instead of files: see involution show --web --help")
    layers = "names or indices, separated by commas, or all; default: the last of every stage, all levels of a pyramid"
    parser.add_argument("--layers", help=layers)
    at = "a pixel of the image whose kernels are drawn; repeatable; default: the centre"
    parser.add_argument("--at", type=_pixel, action="append", default=[], metavar="X,Y", help=at)
    field = "effective receptive fields, which need the memory of a backward pass"
    parser.add_argument("--receptive-field", action=argparse.BooleanOptionalAction, default=True, help=field)
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument("--output", type=Path, default=Path("runs/show"), help="the folder (default: %(default)s)")
    return parser


def _pixel(text: str) -> Pixel:
    x, comma, y = text.partition(",")
    if not (comma and x.strip().isdecimal() and y.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"must be X,Y, two numbers of pixels, got {text!r}")
    return int(x), int(y)


def _check_inside(pixels: Sequence[Pixel], image: Image.Image, file: Path) -> None:
    for x, y in pixels:
        if x >= image.width or y >= image.height:
            raise ValueError(f"at must be inside {file} of {image.width}x{image.height} pixels, got {x},{y}")


def chosen_layers(model: Subject, layers: str | None) -> list[str]:
    """The layers that the option --layers names; those that run on regions cannot be drawn over an image.

    Raises:
        ValueError: the model has no involution, or no such layer, or a layer runs on regions of interest.
    """
    regions = model.of_regions()
    over_image = [name for name in model.layers() if name not in regions]
    if layers is None:
        return last_of_stages(over_image)
    if layers == "all":
        return over_image
    found = select(list(model.layers()), [one.strip() for one in layers.split(",")])
    for name in found:
        if name in regions:
            raise ValueError(f"layers must run on the image, got {name}, which runs on regions of interest")
    return found


def _show(
    model: Subject, chosen: list[str], file: Path, image: Image.Image, stem: Path, options: argparse.Namespace
) -> None:
    """Prints the table of an image and writes its pictures: STEM.png, and STEM/LAYER.WHAT.png."""
    with torch.set_grad_enabled(options.receptive_field):
        calls, (x, view, _) = model.calls(image, chosen)
    pixels = options.at or [(image.width // 2, image.height // 2)]
    _check_seen(pixels, view, file)
    picture = Picture(image, view, pixels)
    rows = []
    for call in (one for one in calls if one.output is not None):
        assert call.output is not None
        grid = Grid.of(call.layer, (x.shape[2], x.shape[3]), call.input_size, call.output_size)
        shown = Shown(call, grid, [])
        places = [shown.position(picture, pixel) for pixel in pixels] if options.receptive_field else []
        rows.append(shown._replace(fields=[receptive_field(call.output, x, *place) for place in places]))
    missing = [name for name in chosen if name not in {shown.call.name for shown in rows}]
    if missing:
        raise ValueError(f"layers must run in evaluation, got {', '.join(missing)}, which did not run on {file}")
    print(f"\n{file}, {image.width}x{image.height}, seen at {view.size[0]}x{view.size[1]}")
    print(table(calls, list(model.layers())))
    title = f"{model.title}\n{file.name}, kernels at {', '.join(f'x {x} y {y}' for x, y in pixels)}"
    sheet = save(draw_sheet(picture, rows, title), stem.with_name(f"{stem.name}.{options.format}"))
    for shown in rows:
        _write(picture, shown, f"{title}, {shown.call.name}", stem, options.format)
    print(f"wrote {sheet}, and a picture of each layer in {stem}/")


def _check_seen(pixels: Sequence[Pixel], view: View, file: Path) -> None:
    """Raises for a pixel that the centre crop removes."""
    left, top, right, bottom = view.to_image((0.0, 0.0, *view.size))
    for x, y in pixels:
        if not (left <= x + 0.5 <= right and top <= y + 0.5 <= bottom):
            raise ValueError(
                f"at must be in the part of {file} that the network receives, x from {max(0, left):.0f} to {right:.0f} "
                f"and y from {max(0, top):.0f} to {bottom:.0f}, got {x},{y}"
            )


def _write(picture: Picture, shown: Shown, title: str, folder: Path, suffix: str) -> None:
    call = shown.call
    name = f"{call.name}.{call.number}" if call.number else call.name
    for what, draw in DRAWINGS.items():
        if what != "field" or shown.fields:
            save(draw(picture, shown, title), folder / f"{name}.{what}.{suffix}")
