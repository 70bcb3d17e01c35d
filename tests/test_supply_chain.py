"""Dependencies: bounded below, constrained to versions that the tests pass with, and their licences listed.

python tests/test_supply_chain.py --write     rewrites constraints.txt from this environment
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")


def direct(*extras: str) -> list[Requirement]:
    """The requirements of the project and of its extras, without those on its own extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [one for one in map(Requirement, lines) if one.name != PROJECT["name"]]


# The page and its browser tests need packages that "dev" does not install, and older versions of some that it does.
APART = ("web", "browser")
EXTRAS = [extra for extra in PROJECT["optional-dependencies"] if extra not in APART]


def installed() -> dict[str, str]:
    """Names and versions of all packages that the extras need in this environment."""
    found: dict[str, str] = {}
    left = [(one, frozenset(one.extras)) for one in direct(*EXTRAS)]
    seen = set()
    while left:
        requirement, extras = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras) in seen or name.startswith(PINNED_BY_TORCH):
            continue
        seen.add((name, extras))
        package = metadata.distribution(name)
        found[name] = Version(package.version).public
        for one in map(Requirement, package.requires or []):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                left.append((one, frozenset(one.extras)))
    return dict(sorted(found.items()))


def constraints() -> dict[str, Requirement]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


@pytest.mark.parametrize("requirement", direct(*EXTRAS), ids=lambda one: one.name)
def test_every_dependency_has_a_lower_bound_which_its_constraint_meets(requirement: Requirement) -> None:
    assert any(one.operator == ">=" for one in requirement.specifier), f"{requirement} has no lower bound"
    if requirement.marker is None or requirement.marker.evaluate():
        [pin] = constraints()[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version)


@pytest.mark.parametrize("requirement", direct(*APART), ids=lambda one: one.name)
def test_dependencies_apart_have_a_lower_bound(requirement: Requirement) -> None:
    assert any(one.operator == ">=" for one in requirement.specifier), f"{requirement} has no lower bound"


def test_versions_known_to_be_bad_are_excluded() -> None:
    bounds = {one.name: one.specifier for one in direct(*EXTRAS)}
    for name, version in (("lightning", "2.6.2"), ("lightning", "2.6.3"), ("torch", "2.9.1"), ("pillow", "10.2.0")):
        assert not bounds[name].contains(version), (name, version)


def test_every_package_that_the_extras_need_is_constrained() -> None:
    missing = set(installed()) - set(constraints())
    assert not missing


def test_the_licence_of_every_package_that_users_install_is_listed() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([^|]+) \|", page.split("## Licences")[1], re.MULTILINE))
    del rows["package"]  # the heading
    names = {one.name for one in direct("zoo", "tasks", "show", "bench", "export")}
    assert set(rows) == names
    copyleft = re.compile(r"\b(A?GPL|LGPL)\b")
    for name in names:
        package = metadata.metadata(name)
        found = " ".join([package.get("License-Expression", ""), *(package.get_all("Classifier") or [])])
        assert not copyleft.search(found), name
        assert not copyleft.search(rows[name]), name


if __name__ == "__main__" and "--write" in sys.argv:
    comments = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("#")]
    pins = [f"{name}=={version}" for name, version in installed().items()]
    CONSTRAINTS.write_text("\n".join([*comments, *pins, ""]))
