"""What the experiments share: a results file with a line for every finished run, and tables in docs/results.md."""

import json
import subprocess
from pathlib import Path
from typing import Any

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
