"""The registry of benchmarks: a function decorated with `@subject` is a subject of `involution bench`."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from .cases import Case
from .roofline import Roofline
from .timer import Row

Workload = tuple[Case, int]  # a layer's call, and the batch size
Function = TypeVar("Function", bound=Callable[..., list[Row]])


class Settings(NamedTuple):
    """The command's options as subjects take them: a subject gets those that it names, as keyword arguments."""

    workloads: Sequence[Workload]  # of --case and --batch
    batches: Sequence[int]  # of --batch
    seconds: float  # for each measurement
    device: str
    dtype: torch.dtype
    roofline: Roofline  # measured before the first subject


class Subject(NamedTuple):
    """A benchmark: its name on the command line, the extra with its packages, and the settings that it takes."""

    name: str
    extra: str
    options: tuple[str, ...]
    function: Callable[..., list[Row]]

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())

    def run(self, settings: Settings) -> list[Row]:
        """Measures."""
        return self.function(**{name: getattr(settings, name) for name in self.options})


SUBJECTS: dict[str, Subject] = {}


def subject(name: str, options: Sequence[str] = (), extra: str = "bench") -> Callable[[Function], Function]:
    """Registers a function that measures and returns rows; see `timer.Row`.

    Args:
        name: on the command line.
        options: names of `Settings` fields, which the function takes as keyword arguments.
        extra: of pyproject.toml, which has the packages that the function imports.

    Raises:
        ValueError: an option is not a field of `Settings`, or the name is taken.
    """
    if unknown := [option for option in options if option not in Settings._fields]:
        raise ValueError(f"options must be of {', '.join(Settings._fields)}, got {', '.join(unknown)}")
    if name in SUBJECTS:
        raise ValueError(f"name must be a new one, got {name!r}, which is registered")

    def register(function: Function) -> Function:
        SUBJECTS[name] = Subject(name, extra, tuple(options), function)
        return function

    return register
