"""The `involution` command: a dispatcher that imports a verb's modules only when the verb is called."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_TRAINING = {
    "fit": "train a model, validating after every epoch",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "run a checkpoint over images",
}
_EXTRAS = {  # the modules that each extra of pyproject.toml installs
    "zoo": ("timm", "safetensors"),
    "export": ("timm", "onnx", "onnxscript"),
    "bench": ("timm", "matplotlib", "rich"),
    "show": ("matplotlib",),
    "web": ("gradio",),
    "tasks": (
        *("lightning", "jsonargparse", "timm", "torchvision", "torchmetrics", "tensorboard", "rich", "sklearn"),
        "faster_coco_eval",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; None takes sys.argv's.

    Returns:
        The exit code: 0, 1 where something is missing or fails, 2 for a wrong call.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot encode
    verb, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"involution {version('involution')}")
        return 0
    verbs: dict[str, Callable[[list[str]], int]] = {
        "convert": _convert,
        "export": _export,
        "cost": _cost,
        "bench": _bench,
        "show": _show,
        "doctor": _doctor,
    }
    verbs |= dict.fromkeys(_TRAINING, lambda rest: _train(verb, rest))
    if verb not in verbs:
        print(
            f"involution: verb must be one of {', '.join(dict.fromkeys([*_TRAINING, *verbs]))}, got {verb!r}",
            file=sys.stderr,
        )
        return 2
    try:
        return verbs[verb](rest)
    except ImportError as error:
        if error.name != "torch":
            raise
        print(f"involution {verb}: {error}", file=sys.stderr)
        return 1


def _help() -> str:
    training = "\n".join(f"  {verb:9} {what}" for verb, what in _TRAINING.items())
    return f"""usage: involution VERB [options]

{training}
  convert   weights of the official repository, PaddleClas or involution fit
            into .safetensors or a checkpoint
  export    write a checkpoint or a timm name for ONNX, torch.export or AOTInductor
  cost      parameters and multiply-adds of a network, or of the paper's tables
  bench     time kernels and networks on this machine
  show      draw the kernels that a checkpoint or a timm name generates for images
  doctor    print backends, versions, instruction set, threads; with --selftest,
            check and time the backends; with a checkpoint or a timm name,
            diagnose why its loss is NaN

  involution fit -c digits_rednet                       a packaged recipe
  involution fit -c recipe.yaml --trainer.max_epochs 3  a file, with an option changed
  involution test -c digits_rednet --ckpt_path runs/digits_rednet/version_0/checkpoints/best.ckpt

involution VERB --help lists a verb's options; involution --version prints the version."""


def _lacks(what: str, extra: str) -> bool:
    """Whether packages of an extra are missing; then says on stderr which, and that `what` needs them."""
    missing = [module for module in _EXTRAS[extra] if find_spec(module) is None]
    if missing:
        print(
            f"involution {what} needs {', '.join(missing)}, not installed here: pip install 'involution[{extra}]'",
            file=sys.stderr,
        )
    return bool(missing)


def _keeps_freed_memory(verb: str) -> bool:
    """Lets malloc keep freed memory; False, after a message, if the environment variable for it is wrong."""
    from .allocator import keep_freed_memory

    try:
        keep_freed_memory()
    except ValueError as error:
        print(f"involution {verb}: {error}", file=sys.stderr)
        return False
    return True


def _cost(rest: list[str]) -> int:
    if _lacks("cost", "tasks"):
        return 1
    from .cost.command import main as cost

    return cost(rest)


def _convert(rest: list[str]) -> int:
    if _lacks("convert", "zoo"):
        return 1
    if any(argument.endswith(".ckpt") for argument in rest[1:]) and _lacks("convert to .ckpt", "tasks"):
        return 1
    from .engine.convert import main as convert

    try:
        convert(rest)
    except (OSError, ValueError) as error:  # the weights, or the output's name
        print(f"involution convert: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        needs = f"{error.name}, not installed here: pip install 'involution[tasks]'"
        print(f"involution convert: a detector or segmenter needs {needs}", file=sys.stderr)
        return 1
    except SystemExit as exit:  # argparse's exit
        return int(exit.code or 0)
    return 0


def _export(rest: list[str]) -> int:
    if _lacks("export", "zoo"):
        return 1
    if {"onnx", "--to=onnx"} & set(rest) and _lacks("export --to onnx", "export"):
        return 1
    if any(Path(argument).is_file() for argument in rest) and _lacks("export CHECKPOINT", "tasks"):
        return 1
    from .export.command import main as export

    return export(rest)


def _bench(rest: list[str]) -> int:
    if _lacks("bench", "bench") or not _keeps_freed_memory("bench"):
        return 1
    from .bench.command import main as bench

    return bench(rest, _lacks)


def _show(rest: list[str]) -> int:
    if _lacks("show", "show") or _lacks("show", "tasks") or ("--web" in rest and _lacks("show --web", "web")):
        return 1
    from .engine.errors import EXPECTED, one_line
    from .show.command import main as show

    try:
        show(rest)
    except EXPECTED as error:  # the model, an image or an option
        print(f"involution show: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # ends the page
        return 0
    except SystemExit as exit:  # from argparse
        return int(exit.code or 0)
    return 0


def _train(verb: str, rest: list[str]) -> int:
    if _lacks(verb, "tasks") or not _keeps_freed_memory(verb):
        return 1
    if verb == "predict":
        return _predict(rest)
    from .engine.recipes import resolve_configs

    try:
        resolve_configs(rest)  # before the slow imports
    except ValueError as error:
        print(f"involution {verb}: {error}", file=sys.stderr)
        return 2
    from . import zoo  # noqa: F401  (registers our models with timm)
    from .engine.command import run
    from .engine.errors import EXPECTED, one_line

    try:
        run([verb, *rest])
    except (*EXPECTED, FloatingPointError) as error:  # wrong arguments or data; or a loss that is NaN
        print(f"involution {verb}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _predict(rest: list[str]) -> int:
    from .engine.errors import EXPECTED, one_line
    from .engine.predict import main as predict

    try:
        predict(rest)
    except EXPECTED as error:  # the checkpoint, an image or an option
        print(f"involution predict: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _doctor(rest: list[str]) -> int:
    """Prints backends, versions, and the machine as torch and the kernels see it; or a network's diagnosis."""
    import platform

    from .allocator import why_not

    try:
        from .ops.backends import cpu_library
        from .ops.backends.selection import backends

        kernels, unchanged = cpu_library.library(), why_not()
    except ValueError as error:  # an environment variable
        print(f"involution doctor: {error}", file=sys.stderr)
        return 1
    if rest and "--selftest" not in rest:
        return _diagnose(rest)
    import torch

    facts = {package: _version(package) for package in ("involution", "timm", "lightning")}
    facts |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "instruction set": cpu_library.instruction_set() if kernels else f"none: {cpu_library.why_not_loaded()}",
        "threads": _threads(torch.get_num_threads()),
        "freed memory": f"malloc unchanged: {unchanged}" if unchanged else "kept by the commands that compute",
        "cuda": _cuda(),
    }
    for name, value in facts.items():
        print(f"{name:16} {value}")
    print(f"\n{'backend':16} {'available':10} {'serves':8} reason")
    for backend in backends():
        print(f"{backend.name:16} {_yes(backend.available):10} {_yes(backend.serves):8} {backend.reason}".rstrip())
    if not rest:
        return 0
    from .bench.selftest import main as selftest

    return selftest(rest)


def _threads(count: int) -> str:
    """The number of threads, and what to do where other processes want the same cores."""
    try:
        busy = os.getloadavg()[0]  # processes of the whole machine that ran or waited, last minute's mean
    except (AttributeError, OSError):  # Windows; a sandbox
        busy = 0.0
    cores = os.cpu_count() or 1
    if busy + count <= cores + 0.5 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return str(count)
    return (
        f"{count}; the load average is {busy:.1f} on {cores} cores: set OMP_WAIT_POLICY=passive, or threads that wait "
        "for each other take the cores from those that work"
    )


def _cuda() -> str:
    """The GPU's name, or why there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "no device" if torch.version.cuda or torch.version.hip else "none: this torch is built for the CPU alone"


def _diagnose(rest: list[str]) -> int:
    if _lacks("doctor MODEL", "tasks"):
        return 1
    from .engine.doctor import main as diagnose

    try:
        diagnose(rest)
    except (OSError, ValueError) as error:  # the model or the image
        print(f"involution doctor: {error}", file=sys.stderr)
        return 1
    except SystemExit as exit:  # from argparse
        return int(exit.code or 0)
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    sys.exit(main())
