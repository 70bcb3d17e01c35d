import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from involution.cli import main
from involution.ops.backends.selection import backends


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_help_loads_no_torch():
    code = """
import json, sys
from involution.cli import main
code = main(["--help"])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = in_fresh_python(code)
    *text, last = done.stdout.splitlines()
    exit_code, modules = json.loads(last)
    assert exit_code == 0
    assert text[0].startswith("usage: involution")
    assert not {"torch", "lightning", "timm", "numpy", "rich"} & set(modules)


def test_no_verb_prints_help(capsys):
    assert main([]) == 0
    assert "usage: involution" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"involution {version('involution')}\n"


def test_unknown_verb(capsys):
    assert main(["fti"]) == 2
    captured = capsys.readouterr()
    assert "'fti'" in captured.err
    assert "fit, validate, test, predict, convert, export, cost, bench, show, doctor" in captured.err
    assert captured.out == ""


def test_unknown_recipe_lists_the_known_ones(capsys):
    assert main(["fit", "-c", "digits_rednett"]) == 2
    message = capsys.readouterr().err
    assert "'digits_rednett'" in message
    assert "digits_rednet," in message


def test_a_missing_extra_is_named_without_traceback():
    code = """
import sys
sys.modules["lightning"] = None
from involution.cli import main
sys.exit(main(["fit", "-c", "digits_rednet"]))
"""
    done = in_fresh_python(code)
    assert done.returncode == 1
    assert "needs lightning" in done.stderr
    assert "pip install 'involution[tasks]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_names_a_torch_for_the_cpu_alone(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    assert "none: this torch is built for the CPU alone" in capsys.readouterr().out


def test_doctor_shows_backends_and_versions(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert words["torch"] == [torch.__version__]
    assert words["threads"][0].rstrip(";") == str(torch.get_num_threads())
    assert words["freed"][:2] in (["memory", "kept"], ["memory", "malloc"])
    for backend in backends():
        assert words[backend.name][0] == ("yes" if backend.available else "no")


def test_doctor_refuses_arguments(capsys):
    assert main(["doctor", "--json"]) == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("arguments", [["fit", "-c", "digits_rednet", "--model.no_such_option", "1"], ["fit", "-c"]])
def test_wrong_options_exit_with_2(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit:  # from jsonargparse
        code = exit.code
    assert code == 2
    assert capsys.readouterr().err


@pytest.mark.usefixtures("in_tmp_path")
def test_missing_data_are_reported_in_one_line(tmp_path, capsys):
    missing = ["fit", "-c", "imagefolder_rednet50", "--data.root", str(tmp_path / "nowhere")]
    assert main(missing) == 1
    assert "involution fit: root must hold a folder 'train'" in capsys.readouterr().err


def test_doctor_explains_a_wrong_environment_variable():
    code = "import os; os.environ['INVOLUTION_ISA'] = 'sse9'; from involution.cli import main; main(['doctor'])"
    done = in_fresh_python(code)
    assert "involution doctor: INVOLUTION_ISA='sse9': wanted" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("policy", "remedied"), [("active", False), ("passive", True)])
def test_doctor_names_the_remedy_for_busy_cores(policy, remedied, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (1e4, 0.0, 0.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert main(["doctor"]) == 0
    assert ("set OMP_WAIT_POLICY=passive" in capsys.readouterr().out) is not remedied


@pytest.mark.parametrize("verb", ["fit", "predict", "bench"])
def test_a_wrong_value_of_keep_memory_is_one_line(verb, monkeypatch, capsys):
    monkeypatch.setenv("INVOLUTION_KEEP_MEMORY", "maybe")
    assert main([verb]) == 1
    assert f"involution {verb}: INVOLUTION_KEEP_MEMORY must be 0 or 1, got 'maybe'" in capsys.readouterr().err
