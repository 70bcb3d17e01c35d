"""The report of all measurements: tables for the console, JSON, and pictures."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .timer import Row

_HIDDEN = ("what", "case", "batch", "seconds", "flops", "bytes", "quartiles, ms")


def print_tables(results: dict[str, list[Row]]) -> None:
    """A table for each subject, and geometric means of its ratios over the cases of a batch."""
    for subject, rows in results.items():
        columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _HIDDEN]
        table = Table(title=subject)
        for name in ("", "case", "batch", *columns):
            table.add_column(name, justify="left" if name in ("", "case") else "right")
        for row in [*rows, *geometric_means(rows)]:
            cells = [_cell(row.get(name, "")) for name in columns]
            table.add_row(str(row["what"]), str(row["case"]), str(row["batch"]), *cells)
        Console(width=150).print(table)


def geometric_means(rows: list[Row]) -> list[Row]:
    """For every kind of measurement and batch size with several cases, a row with the means of its columns."""
    kinds = dict.fromkeys((row["what"], row["batch"]) for row in rows)
    means = []
    for what, batch in kinds:
        group = [row for row in rows if (row["what"], row["batch"]) == (what, batch)]
        ratios = [
            name for name in group[0] if name not in _HIDDEN and all(isinstance(row.get(name), float) for row in group)
        ]
        if len(group) > 1 and ratios:
            row: Row = {"what": what, "case": "geometric mean", "batch": batch}
            means.append(row | {r: math.exp(sum(math.log(row[r]) for row in group) / len(group)) for r in ratios})
    return means


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write(results: dict[str, list[Row]], machine: dict[str, Any], folder: Path) -> list[Path]:
    """Writes bench.json and the pictures of those subjects that were measured; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "bench.json"]
    means = {subject: geometric_means(rows) for subject, rows in results.items()}
    files[0].write_text(json.dumps({"machine": machine, "results": results, "geometric means": means}, indent=1))
    kernels = [row for subject in ("layers", "fused") for row in results.get(subject, [])]
    if kernels:
        files.append(_roofline(kernels, machine, folder / "roofline.png"))
    ratios = [row for subject in ("models", "training") for row in results.get(subject, [])]
    if ratios:
        files.append(_ratios(ratios, folder / "models.png"))
    if results.get("memory"):
        files.append(_memory(results["memory"], folder / "memory.png"))
    return files


def _roofline(rows: list[Row], machine: dict[str, Any], file: Path) -> Path:
    figure, axes = _figure("Roofline of the kernels")
    peak, bandwidth = machine["peak GFLOP/s"], machine["copy GB/s"]
    densest = max(row["flops"] / row["bytes"] for row in rows)
    intensities = [0.5, peak / bandwidth, 2 * max(densest, peak / bandwidth)]
    axes.loglog(
        intensities, [min(peak, intensity * bandwidth) for intensity in intensities], color="black", label="roofline"
    )
    for marker, what in zip("osd^", dict.fromkeys(row["what"] for row in rows), strict=False):
        some = [row for row in rows if row["what"] == what]
        speeds = [row["flops"] / row["seconds"] / 1e9 for row in some]
        axes.loglog([row["flops"] / row["bytes"] for row in some], speeds, marker, label=what)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    figure.savefig(file)
    return file


def _ratios(rows: list[Row], file: Path) -> Path:
    figure, axes = _figure("Time of RedNet-50 over ResNet-50's")
    axes.bar([f"{row['what']}\nbatch {row['batch']}" for row in rows], [row["ratio"] for row in rows])
    axes.axhline(0.65, color="black", linestyle="--", label="multiply-adds")
    axes.axhline(1, color="gray")
    axes.legend()
    figure.savefig(file)
    return file


def _memory(rows: list[Row], file: Path) -> Path:
    figure, axes = _figure(f"Extra memory of one layer, {rows[0]['case']}")
    axes.barh([row["what"] for row in rows], [row["MiB"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("MiB")
    figure.savefig(file)
    return file


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes
