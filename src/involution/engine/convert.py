"""`involution convert`: a file of weights, ours or other people's, to .safetensors or a checkpoint of `involution fit`.

Classifiers and backbones are written with timm's names, which needs no task. Detectors, segmenters and all checkpoints
are built by their task's Lightning module; the module `convert` of a task's package maps other people's names to ours.
"""

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..zoo.checkpoints import RECORD, Checkpoint, check, read_checkpoint
from ..zoo.identify import Classifier, Identity, classifier, task_of
from .atomic import atomic_write


def main(arguments: list[str]) -> None:
    """Converts, and prints what was written and how to load it.

    Args:
        arguments: of the verb.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no weights, or not those of a network of ours; the output's name has another ending.
        SystemExit: an argument is wrong or missing (the message is on stderr).
    """
    parser = argparse.ArgumentParser(
        prog="involution convert",
        description="Reads checkpoints of involution fit, state dicts, .safetensors, the official repository's files "
        "(mmcls, mmdet 2.x, mmseg 0.x) and PaddleClas's (.pdparams). Nothing in a file is run.",
    )
    parser.add_argument("file", type=Path, help="the weights")
    parser.add_argument("output", type=Path, help="OUT.safetensors, or OUT.ckpt for involution test and predict")
    parser.add_argument("--backbone", action="store_true", help="take the backbone alone, for .safetensors")
    given = parser.parse_args(arguments)
    if given.output.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"output must end in .safetensors or .ckpt, got {given.output}")
    if given.output.suffix == ".ckpt" and given.backbone:
        raise ValueError(f"output must end in .safetensors for a backbone, got {given.output}")
    if given.output.exists() and given.output.samefile(given.file):
        raise ValueError(f"output must be another file than the weights, got {given.output} twice")
    print(convert(given.file, given.output, given.backbone))


def convert(file: Path, output: Path, backbone: bool = False) -> str:
    """Converts a file.

    Args:
        file: of weights, see `involution.zoo.checkpoints`.
        output: .safetensors or .ckpt.
        backbone: take the backbone alone.

    Returns:
        Lines that say what was written, and how to load it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no weights, or its tensors are not exactly those of its network.
    """
    content = read_checkpoint(file)
    task = task_of(content)
    if output.suffix == ".safetensors" and (backbone or task == "classify"):
        return _write_classifier(classifier(content, str(file), backbone), {} if backbone else content.record, output)
    module = _module(content, task, file)
    if output.suffix == ".safetensors":
        return _write_network(module, output)
    return _write_checkpoint(module, output)


def _module(content: Checkpoint, task: str, file: Path) -> Any:
    """The Lightning module of the task, its network filled with the file's weights."""
    from .checkpoints import named_class, without_sources

    weights, classes, record = content
    kind: Any
    if "hyper_parameters" in record:
        kind = named_class(record.get("involution", {}), file, "weights")
    else:
        foreign = importlib.import_module(f"..tasks.{task}.convert", __package__)
        kind = foreign.MODULE
    with torch.device("meta"):  # without values, which would take seconds to sample and be replaced
        if "hyper_parameters" in record:
            given = record["hyper_parameters"] | without_sources(record["hyper_parameters"])
            try:
                module = kind(**{name: value for name, value in given.items() if not name.startswith("_")})
            except TypeError as error:
                raise ValueError(f"hyperparameters must be {kind.__name__}'s, got {file}: {error}") from error
            module.on_load_checkpoint(record)
        else:
            arguments, weights, preprocessing = foreign.converted(weights, file)
            module = kind(**arguments)
            module.preprocessing = preprocessing
            if classes is not None and len(classes) == module.num_classes:
                module.classes = classes
    module.hparams["_class_path"] = f"{kind.__module__}.{kind.__qualname__}"  # by which the command line builds it
    check(weights, module.net.state_dict(), f"weights must be those of the {task} network, got {file}")
    module.net.load_state_dict(weights, assign=True)
    return module


def _write_classifier(found: Classifier, record: dict[str, Any], output: Path) -> str:
    if not record and found.classes:
        record = {"involution": {"classes": found.classes}}
    _write(found.weights, record, output)
    call = f'timm.create_model({Identity(found.name, found.arguments)}, checkpoint_path="{output}")'
    return f"{found.name}: {len(found.weights)} tensors in {output}\nnext: {call}"


def _write_network(module: Any, output: Path) -> str:
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    weights = module.net.state_dict()
    _write(weights, checkpoint, output)
    name = module.hparams["model_name"]
    return (
        f"{name}: {len(weights)} tensors in {output}\nnext: involution convert {output} {output.with_suffix('.ckpt')}"
    )


def _write_checkpoint(module: Any, output: Path) -> str:
    """A checkpoint as Lightning writes it, without the state of a training run."""
    from lightning.pytorch import Trainer

    from .checkpoints import AtomicCheckpointIO
    from .console import quiet_lightning

    quiet_lightning()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(output, weights_only=True)
    name = module.hparams["model_name"]
    return (
        f"{name}: {len(module.net.state_dict())} tensors in {output}\n"
        f"next: involution predict --ckpt_path {output} --data.predict_path PHOTOGRAPHS --output RESULTS"
    )


def _write(weights: Mapping[str, Tensor], record: dict[str, Any], output: Path) -> None:
    """Writes a .safetensors file atomically; its metadata hold the record, without the entries that Lightning adds."""
    if "hyper_parameters" in record:
        given = {name: value for name, value in record["hyper_parameters"].items() if not name.startswith("_")}
        record = {**record, "hyper_parameters": given}
    metadata = {"format": "pt"} | ({RECORD: json.dumps(record)} if record else {})
    plain = {
        name: one.detach().contiguous().clone(memory_format=torch.contiguous_format) for name, one in weights.items()
    }
    with atomic_write(output) as part:  # not save_file, whose own temporary file a killed process would leave
        part.write_bytes(save(plain, metadata))
