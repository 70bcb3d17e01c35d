"""From a network to a file: traced once by torch.export, then written for one of three runtimes."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..ops import decompositions as standard
from ..ops import fused as fused  # registers the operators
from ..rewrite.checks import check_inference

Metadata = Mapping[str, Any]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for `ExportedProgram.run_decompositions`: PyTorch's default one, and this package's operators.

    What is left are PyTorch's core operators, which run where this package has never been installed.

    Example:
        >>> import torch, involution
        >>> from involution.export import decompositions
        >>> layer, x = involution.Involution2d(16, 3).eval(), torch.rand(1, 16, 8, 8)
        >>> program = torch.export.export(layer, (x,)).run_decompositions(decompositions())
        >>> any("involution" in str(node.target) for node in program.graph.nodes)
        False
    """
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    for name in ("apply", "adjoint", "correlate", "fused_layer", "fused_bottleneck"):
        table[getattr(torch.ops.involution, name).default] = getattr(standard, name)
    return table


def trace(
    network: nn.Module, example: Tensor, dynamic: Sequence[int] = (0, 2, 3), multiple: int = 1
) -> ExportedProgram:
    """torch.export of a network for inference, with this package's operators kept.

    The program is the same on every machine: it has the fused layer whether or not there are kernels for it here.

    Args:
        network: takes a batch of images.
        example: [N, C, H, W]; N must be at least 2 where axis 0 is dynamic.
        dynamic: axes whose size stays free.
        multiple: of which a free height and width are multiples.

    Raises:
        TypeError: network is no module, or example no tensor.
        ValueError: network is in training mode, or example does not fit.
    """
    check_inference(network, example, "network", "example")
    if any(example.shape[axis] < 2 * (multiple if axis > 1 else 1) for axis in dynamic):
        raise ValueError(
            f"example must have at least 2 images, and 2 * {multiple} pixels along a side, where the size stays free "
            f"(axes {list(dynamic)}), got {list(example.shape)}"
        )
    free: dict[int, Any] = dict.fromkeys(dynamic, Dim.DYNAMIC)
    if multiple > 1:
        free |= {axis: multiple * Dim(f"units{axis}", min=1) for axis in dynamic if axis > 1}
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=(free,) if free else None)


def to_onnx(program: ExportedProgram, file: Path, outputs: Sequence[str], metadata: Metadata | None = None) -> None:
    """Writes an ONNX file of standard operators; its input is called images.

    Args:
        program: see `trace`.
        file: to be written.
        outputs: names of the network's.
        metadata: goes into the model's metadata_props, what is not text as JSON.

    Raises:
        RuntimeError: the exporter does not know one of the network's operators.
    """
    from .translations import translations

    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=list(outputs),
        custom_translation_table=translations(),
    )
    assert made is not None
    made.model.metadata_props.update(_as_text(metadata))
    made.save(str(file))


def to_pt2(program: ExportedProgram, file: Path, metadata: Metadata | None = None, keep: bool = True) -> None:
    """Writes a program that torch.export.load reads, with `metadata` as the extra file metadata.json.

    Args:
        program: see `trace`.
        file: to be written.
        metadata: plain values.
        keep: keeps this package's operators, which have kernels: loading wants ``import involution.ops``. False takes
            them apart, see `decompositions`.
    """
    program = program if keep else program.run_decompositions(decompositions())
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(dict(metadata or {}))})


def to_aoti(program: ExportedProgram, file: Path, metadata: Metadata | None = None) -> None:
    """Compiles a package for this machine's processor; torch._inductor.aoti_load_package reads it.

    Args:
        program: see `trace`.
        file: to be written, with suffix .pt2.
        metadata: its values, as JSON where they are not text, are what the loaded package's get_metadata() returns.

    Raises:
        ValueError: file has another suffix.
    """
    if file.suffix != ".pt2":
        raise ValueError(f"file must end in .pt2 for AOTInductor, got {file}")
    configs = {"aot_inductor.metadata": _as_text(metadata)}
    standard = program.run_decompositions(decompositions())
    torch._inductor.aoti_compile_and_package(standard, package_path=str(file), inductor_configs=configs)


def _as_text(metadata: Metadata | None) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
