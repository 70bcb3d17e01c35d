"""Recipes: the YAML files in tasks/*/recipes, found by name."""

from importlib.resources import as_file, files
from pathlib import Path


def recipes() -> dict[str, Path]:
    """Every packaged recipe: name -> file, sorted by name."""
    found = {}
    with as_file(files("involution.tasks")) as folder:
        for path in folder.glob("*/recipes/*.yaml"):
            found[path.stem] = path
    return dict(sorted(found.items()))


def find_recipe(name: str) -> Path:
    """The file of `-c NAME`: an existing file of that path, otherwise the packaged recipe of that name.

    Raises:
        ValueError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        raise ValueError(f"config must be a file or one of the recipes {', '.join(known)}, got {name!r}")
    return known[name]


def resolve_configs(arguments: list[str]) -> tuple[list[str], str | None]:
    """Replaces recipe names after -c or --config with their files.

    Returns:
        The arguments, and the first config's name without its ending (None where no config is given).

    Raises:
        ValueError: a config is neither a file nor a recipe; nothing follows the last -c.
    """
    resolved: list[str] = []
    first = None
    left = iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag not in ("-c", "--config"):
            resolved.append(argument)
            continue
        name = value if equals else next(left, "")
        path = find_recipe(name)
        first = first or path.stem
        resolved += ["--config", str(path)]
    return resolved, first
