"""involution cost: parameters and multiply-adds of a network, or of all rows of the paper's tables."""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..zoo.resnet import counterpart
from .count import Cost
from .published import ROWS, Counted, Row, cost_of, count_row, disagreement


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="involution cost", description=__doc__)
    parser.add_argument("model", nargs="?", help="a name that timm.create_model takes, or a row of --published")
    parser.add_argument("--published", action="store_true", help="all rows of the paper's tables")
    parser.add_argument("--layers", action="store_true", help="the cost of every layer")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="default: the model's own")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(arguments)
    if options.published == (options.model is not None):
        print("involution cost: wants either a model or --published", file=sys.stderr)
        return 2
    if options.published:
        _print_rows([(row, count_row(row)) for row in ROWS], options.format)
        return 0
    rows = {row.name: row for row in ROWS}
    if options.model in rows:
        _print_rows([(rows[options.model], count_row(rows[options.model]))], options.format)
        return 0
    try:
        found, size = cost_of(options.model, tuple(options.input_size) if options.input_size else None)
        other = counterpart(options.model)
        compared = cost_of(other, size)[0] if other else None
    except ValueError as error:
        print(f"involution cost: {error}", file=sys.stderr)
        return 2
    if options.format == "json":
        print(json.dumps(_as_json(options.model, found, size, options.layers), indent=1))
        return 0
    _print_cost(options.model, found, size, options.layers)
    if other and compared:
        print(f"its convolutional counterpart {other}: {_figures(compared)}")
        print(
            f"saves {1 - found.parameters / compared.parameters:.1%} of the parameters and "
            f"{1 - found.multiply_adds / compared.multiply_adds:.1%} of the multiply-adds"
        )
    return 0


def _print_rows(rows: list[tuple[Row, Counted]], form: str) -> None:
    if form == "json":
        print(json.dumps([counted._asdict() for _, counted in rows], indent=1))
        return
    table = Table(title="multiply-adds of one image, G", caption="M: trainable parameters of the counted model")
    for column in ("row", "published M", "G", "counted M", "G", "total G", "MAC G", "where the paper differs"):
        table.add_column(column, justify="left" if column in ("row", "where the paper differs") else "right")
    for row, counted in rows:
        printed = [f"{value:.2f}" for value in row.printed] if row.printed else ["", ""]
        gigas = [f"{counted.counted / 1e9:.4f}", *(f"{value / 1e9:.3f}" for value in (counted.total, counted.mac))]
        table.add_row(row.name, *printed, f"{counted.params_trainable / 1e6:.4f}", *gigas, disagreement(row, counted))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _print_cost(name: str, found: Cost, size: Sequence[int], layers: bool) -> None:
    print(f"{name} at {'x'.join(map(str, size))}: {_figures(found)}")
    if not layers:
        return
    table = Table()
    for column in ("module", "kind", "parameters", "multiply-adds", "others"):
        table.add_column(column, justify="left" if column in ("module", "kind") else "right")
    for operation in found.operations:
        table.add_row(*operation[:2], *(f"{count:,}" for count in operation[2:]))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _figures(found: Cost) -> str:
    frozen = "" if found.trainable == found.parameters else f" ({found.trainable:,} trainable)"
    return (
        f"{found.parameters:,} parameters{frozen}, {found.multiply_adds:,} multiply-adds (MAC), "
        f"{found.total:,} by the paper's rules"
    )


def _as_json(name: str, found: Cost, size: Sequence[int], layers: bool) -> dict[str, object]:
    result: dict[str, object] = {
        "model": name,
        "input_size": list(size),
        "params": found.parameters,
        "params_trainable": found.trainable,
        "total": found.total,
        "mac": found.multiply_adds,
    }
    return result | ({"layers": [operation._asdict() for operation in found.operations]} if layers else {})
