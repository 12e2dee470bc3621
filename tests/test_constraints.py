"""infra/constraints.txt pins everything pyproject.toml asks for, within its bounds, and points at no one's machine."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "infra/constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)", line).groups()
            found[canonicalize_name(name)] = version
    return found


def test_every_requirement_is_pinned_within_its_bounds():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
    requirements = [Requirement(text) for text in texts]
    pinned = pins()
    assert len(requirements) > 15
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert name in pinned, f"{name} has no line in infra/constraints.txt"
            assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes {pinned[name]}"
