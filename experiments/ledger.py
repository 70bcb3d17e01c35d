"""Shared by the experiments: a results file with one line per finished run, and tables in docs/results.md."""

import argparse
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = FOLDER.parent / "results.md"


def git(*arguments: str) -> str:
    """git's output in this repository; errors go to stderr, and a failed commit is included in the next one."""
    return subprocess.run(["git", *arguments], cwd=FOLDER, check=False, stdout=subprocess.PIPE, text=True).stdout


def code_version() -> str:
    """The current commit, with "-dirty" if the code has been changed since."""
    return git("describe", "--always", "--dirty", "--exclude", "*").strip()


def finished(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, line: dict[str, Any], message: str | None) -> None:
    """Appends a line to a results file and, with a message, commits it."""
    with file.open("a") as stream:
        stream.write(json.dumps({name: round_floats(value) for name, value in line.items()}) + "\n")
    if message is not None:
        git("add", str(file))
        git("commit", "--quiet", "--only", "-m", message, "--", str(file))


def round_floats(value: Any) -> Any:
    """Rounds floats to four decimals, also in lists and dictionaries."""
    if isinstance(value, list):
        return [round_floats(one) for one in value]
    if isinstance(value, dict):
        return {name: round_floats(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def write_tables(tables: dict[str, str]) -> None:
    """Writes tables between their markers in docs/results.md."""
    page = PAGE.read_text()
    for name, table in tables.items():
        before, start, rest = page.partition(f"<!-- table: {name} -->\n")
        after = rest.partition("<!-- end -->")[2]
        page = f"{before}{start}{table}\n<!-- end -->{after}"
        print(table, end="\n\n")
    PAGE.write_text(page)
    print(f"wrote {PAGE}")


def fit(options: list[str], root: str, folder: str) -> Any:
    """Runs `involution fit` on the CPU, without progress bar, into a folder; returns the command-line object."""
    from involution.engine.command import run

    where = ["--data.root", root, "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder]
    return run(["fit", *options, *where, *quiet])


def curves(cli: Any, *metrics: str) -> list[tuple[list[int], list[float]]]:
    """Epochs and values of a run's metrics."""
    from involution.engine.curves import read_curve

    log = Path(str(cli.trainer.log_dir)) / "metrics.csv"
    return [read_curve(log, metric) for metric in metrics]


class Experiment(NamedTuple):
    """A set of runs of `involution fit`, each one line of a results file.

    `runs` maps every run's name to its options; `train` takes name, options and the data's root, and returns the
    further fields of the line; `headline` is the main result in a few words; `report` writes tables and pictures.
    """

    title: str
    results: Path
    runs: dict[str, list[str]]
    train: Callable[[str, list[str], str], dict[str, Any]]
    headline: Callable[[dict[str, Any]], str]
    report: Callable[[list[dict[str, Any]]], None]

    def main(self, arguments: list[str], description: str | None) -> None:
        """Lists, runs or reports."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=["list", "run", "report"])
        parser.add_argument("--root", help="the folder of the data, as --data.root of the recipe")
        parser.add_argument("--only", default="", help="runs whose name starts with this")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--commit", action="store_true", help="commit the results file after every run")
        given = parser.parse_args(arguments)
        if given.what == "report":
            self.report(finished(self.results))
            return
        if given.what == "run" and given.root is None:
            parser.error("run wants --root")
        torch.set_num_threads(given.threads)
        for name, some in self.runs.items():
            if not name.startswith(given.only):
                continue
            options = [*some, "--seed_everything", str(given.seed)]
            done = any((line["name"], line["options"]) == (name, options) for line in finished(self.results))
            if given.what == "list":
                print("done" if done else "open", f"{name}: involution fit", shlex.join(options))
            elif not done:
                line = {"name": name, "seed": given.seed, "options": options, "commit": code_version()}
                line |= {"threads": given.threads, "torch": torch.__version__}
                line |= self.train(name, options, given.root)
                what = f"{name}, seed {given.seed}: {self.headline(line)}"
                append(self.results, line, f"{self.title}: {what}" if given.commit else None)
                print(f"{what} in {line['seconds']:.0f} s", flush=True)
