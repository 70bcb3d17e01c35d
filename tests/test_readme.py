"""The README is true: its code runs, and its table of what runs where says what the selection says."""

import re
from pathlib import Path

import pytest
import torch

import involution
from involution.engine.recipes import resolve_configs
from involution.ops.backends import cpu
from involution.ops.backends import triton as gpu

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(block, names)
    if "layer" in names:
        assert names["layer"](names["x"]).shape == (8, 64, 28, 28)
        assert names["y"].shape == (8, 64, 56, 56)
        assert names["y"].is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_left_to_fill_in_and_files_exist() -> None:
    assert not re.findall(r"[A-Z]+_TABLE", README)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_commands_name_recipes_that_exist() -> None:
    commands = re.findall(r"^involution (?:fit|test) (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        resolve_configs(command.split())


def test_the_first_screen_has_install_and_two_commands_and_no_times() -> None:
    first = README.partition("## What runs where")[0]
    assert first.count("pip install") == 1
    assert [line.split()[1] for line in first.splitlines() if line.startswith("involution ")] == ["fit", "predict"]
    assert not re.search(r"\d (?:ms|seconds|minutes)\b", first)  # no times without command and machine


def rows() -> list[tuple[str, str]]:
    """(devices, backend) of every row of the table."""
    table = README.partition("## What runs where")[2].partition("\n\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(row[0], re.match(r"`(\w+)`", row[1])[1]) for row in cells]


def serving(device: str) -> str:
    x, k = torch.empty(1, 4, 5, 5, device=device), torch.empty(1, 2, 3, 3, 5, 5, device=device)
    return next(record.name for record in involution.backends(x, k, 1, 1) if record.serves)


def test_table_of_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows()
    assert [devices for devices, _ in table] == [
        "`cpu`",
        "`cpu`, installed without kernels",
        "`cuda` (NVIDIA, AMD), `xpu`",
        "`mps`, all else",
    ]
    assert serving("cpu") == table[0][1]
    assert table[2][1] == "triton"  # tests marked gpu try it
    assert all(f"`{device}`" in table[2][0] for device in gpu.DEVICES)
    assert serving("meta") == table[3][1]  # a device without kernels of its own
    monkeypatch.setattr(cpu, "why_not_loaded", lambda: "not installed")
    with pytest.warns(RuntimeWarning, match="reference path"):
        assert serving("cpu") == table[1][1]
