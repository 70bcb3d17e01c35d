"""Training runs in processes of their own, forked from a server that has imported everything once."""

import multiprocessing
import os
import pickle
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["involution.cli", "involution.engine.command", *(f"involution.tasks.{name}" for name in ("classify", "segment"))]
)


def sent_to_workers(loader: Any, reader: Any) -> bytes:
    """What a data loader and a reader send to worker processes; Python 3.14 pickles it."""
    return pickle.dumps((loader.dataset, loader.collate_fn, reader))


class Run:
    """A process that calls a function of a test module in a folder; its output goes to a file beside that folder.

    Args:
        folder: where it runs.
        function: to call, defined at the top of its file.
        arguments: of the function.
        environment: variables to set first.
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self._output = folder.with_name(f"{folder.name}_{environment.get('RANK', environment.get('SLURM_PROCID', 0))}")
        call = (function.__code__.co_filename, function.__name__, arguments, folder, self._output, environment)
        self.process: ForkServerProcess = _CONTEXT.Process(target=_call, args=call)
        self.process.start()

    def finish(self, code: int = 0) -> str:
        """Waits until it ends with this exit code (negative: a signal's number), and returns its output."""
        self.process.join(300)
        output = self._output.read_text(errors="replace")
        assert self.process.exitcode == code, output
        return output


def _call(
    file: str, name: str, arguments: Sequence[Any], folder: Path, output: Path, environment: dict[str, str]
) -> None:
    # Loader workers end with the run they are forked from; those of a fork server would outlive a run that is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    os.environ.update(environment)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for standard in (1, 2):
        os.dup2(stream, standard)
    function = runpy.run_path(file)[name]  # test modules have no name that another process could import
    sys.exit(function(*arguments))


def command(*arguments: str) -> int:
    """The command line, as a function for `Run`."""
    from involution.cli import main

    return main(arguments)


def free_port() -> int:
    """A TCP port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ranks(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Run]:
    """Two processes with the environment variables that torchrun sets."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [Run(folder, function, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
