"""What the experiments share: a results file with a line for every finished run, and tables in docs/results.md."""

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = FOLDER.parent / "results.md"


def git(*arguments: str) -> str:
    """What git says, in this repository; its errors go to stderr, and a commit that failed waits for the next."""
    return subprocess.run(["git", *arguments], cwd=FOLDER, check=False, stdout=subprocess.PIPE, text=True).stdout


def code_version() -> str:
    """The commit of the code that runs, and whether it has been changed since."""
    return git("describe", "--always", "--dirty", "--exclude", "*").strip()


def finished(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, line: dict[str, Any], message: str | None) -> None:
    """One line more in a results file, on disk and, with a message, in a commit of its own."""
    with file.open("a") as stream:
        stream.write(json.dumps({name: round_floats(value) for name, value in line.items()}) + "\n")
    if message is not None:
        git("add", str(file))
        git("commit", "--quiet", "--only", "-m", message, "--", str(file))


def round_floats(value: Any) -> Any:
    """Floats to four decimals, in lists and dictionaries too."""
    if isinstance(value, list):
        return [round_floats(one) for one in value]
    if isinstance(value, dict):
        return {name: round_floats(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def quoted(option: str) -> str:
    """As a shell wants it."""
    return f"'{option}'" if any(character in option for character in ' {["') else option


def write_tables(tables: dict[str, str]) -> None:
    """Puts tables between their marks in docs/results.md."""
    page = PAGE.read_text()
    for name, table in tables.items():
        before, start, rest = page.partition(f"<!-- table: {name} -->\n")
        after = rest.partition("<!-- end -->")[2]
        page = f"{before}{start}{table}\n<!-- end -->{after}"
        print(table, end="\n\n")
    PAGE.write_text(page)
    print(f"wrote {PAGE}")


def fit(options: list[str], root: str, folder: str) -> Any:
    """`involution fit` on the CPU, quietly, its run in a folder; returns the finished command line."""
    from involution.engine.command import run

    where = ["--data.root", root, "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder]
    return run(["fit", *options, *where, *quiet])


def curves(cli: Any, *metrics: str) -> list[tuple[list[int], list[float]]]:
    """Epochs and values of some metrics of a run."""
    from involution.show.curves import read_curve

    log = Path(str(cli.trainer.log_dir)) / "metrics.csv"
    return [read_curve(log, metric) for metric in metrics]


class Experiment(NamedTuple):
    """A few runs of `involution fit`, each a line of a results file.

    `runs` has every run's options by its name; `train` takes name, options and the data's root, and returns what the
    line has besides; `headline` says in a few words what came out; `report` writes tables and pictures.
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
        parser.add_argument("--only", default="", help="runs whose name begins so")
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
                print("done" if done else "open", f"{name}: involution fit", *map(quoted, options))
            elif not done:
                line = {"name": name, "seed": given.seed, "options": options, "commit": code_version()}
                line |= {"threads": given.threads, "torch": torch.__version__}
                line |= self.train(name, options, given.root)
                what = f"{name}, seed {given.seed}: {self.headline(line)}"
                append(self.results, line, f"{self.title}: {what}" if given.commit else None)
                print(f"{what} in {line['seconds']:.0f} s", flush=True)
