"""The oldest versions that are allowed are those that the tests run with."""

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def requirements(text):
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def bounds(operator, declared):
    """The one version of that operator, by name."""
    found = {}
    for requirement in declared:
        versions = [part.version for part in requirement.specifier if part.operator == operator]
        assert len(versions) == 1, f"{requirement}; wanted: one version after {operator}"
        assert requirement.name not in found
        (found[requirement.name],) = versions
    return found


def test_lowest_versions_are_those_of_setup_cfg():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    declared = [
        requirement
        for text in (setup["options"]["install_requires"], *map(extras.get, extras))
        for requirement in requirements(text)
        if requirement.name != "captum-reflected"
    ]
    # Of a developer's tools the newest are taken.
    tools = {requirement.name for requirement in requirements(extras["dev"])}
    assert all(not tool.specifier for tool in requirements(extras["dev"]))
    tested = requirements((ROOT / "tests" / "lowest_versions.txt").read_text())
    assert bounds("==", tested) == bounds(
        ">=", [requirement for requirement in declared if requirement.name not in tools]
    )
