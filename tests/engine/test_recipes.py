from pathlib import Path

import pytest

from involution.engine.recipes import find_recipe, recipes, resolve_configs


def test_packaged_recipes():
    assert set(recipes()) >= {
        "cifar10_rednet26",
        "cifar10_resnet26",
        "digits_rednet",
        "digits_resnet",
        "imagefolder_rednet50",
        "imagenet_rednet50_modern",
        *(f"imagenet_{family}{depth}" for family in ("rednet", "resnet") for depth in (26, 38, 50, 101, 152)),
    }
    assert all(path.is_file() for path in recipes().values())


def test_find_by_name_and_by_path(tmp_path, monkeypatch):
    assert find_recipe("digits_rednet").name == "digits_rednet.yaml"
    mine = tmp_path / "mine.yaml"
    mine.touch()
    assert find_recipe(str(mine)) == mine
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize("name", ["digits", "no/such/file.yaml", ""])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"digits_rednet, digits_resnet") as caught:
        find_recipe(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [["-c", "digits_rednet"], ["--config", "digits_rednet"], ["--config=digits_rednet"], ["-c=digits_rednet"]],
)
def test_resolve_replaces_names_only_after_the_flag(arguments):
    resolved, name = resolve_configs([*arguments, "--model.model_name", "digits_rednet"])
    assert resolved == ["--config", str(recipes()["digits_rednet"]), "--model.model_name", "digits_rednet"]
    assert name == "digits_rednet"


def test_first_config_names_the_run(tmp_path):
    second = tmp_path / "more.yaml"
    second.touch()
    resolved, name = resolve_configs(["-c", "digits_resnet", "-c", str(second)])
    assert resolved[-1] == str(second)
    assert name == "digits_resnet"
    assert resolve_configs(["--trainer.max_epochs", "3"]) == (["--trainer.max_epochs", "3"], None)
