"""The lock file is whole for every Python that it is installed on: the developers' and the container image's."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from distributions import declared
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orchestration.doctor import torch_builds

ROOT = Path(__file__).resolve().parents[2]
IMAGE_PYTHON = {"ubuntu24.04": "3.12"}
"""The Python that `apt-get install python3` brings, by the end of the base image's name."""
LOCKED_EXTRAS = ("", "remote", "train", "cluster", "serve")
"""Of the project: what `make lock` resolves; the others are the developers', or optional even there."""
APART = {"torch", "triton"}
"""Installed before the lock, from PyTorch's own index, with its CUDA libraries."""


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def unmet(python: str) -> list[str]:
    """What the project and the locked packages require on a Python and the lock does not give."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    versions = locked()
    todo = [("latentzoom", requirement) for extra in LOCKED_EXTRAS for requirement in declared(extra)]
    seen: set[str] = set()
    found = []
    while todo:
        asker, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in APART or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if name not in versions or not requirement.specifier.contains(versions[name], prereleases=True):
            found.append(f"{asker} requires {requirement}, the lock has {versions.get(name)}")
            continue
        package = metadata.metadata(name)
        if not SpecifierSet(package.get("Requires-Python") or "").contains(f"{python}.0"):
            found.append(f"{name} {versions[name]} requires Python {package['Requires-Python']}")
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({**environment, "extra": e}) for e in extras):
                todo.append((name, needed))
    return found


@pytest.mark.parametrize("python", ["3.11", *IMAGE_PYTHON.values()])
def test_every_requirement_of_every_locked_package_is_locked(python):
    assert unmet(python) == []


def test_the_images_python_is_one_of_them_and_can_build_the_project():
    images = [build.base for build in torch_builds.BUILDS]
    for image in images:
        assert any(image.endswith(base) for base in IMAGE_PYTHON), f"which Python has {image}? Say so in IMAGE_PYTHON"
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, build):  # venv brings none since Python 3.12, and pip is told not to fetch any
        assert requirement.specifier.contains(locked()[requirement.name])


def test_the_image_has_what_rays_launcher_starts_machines_with():
    """boto3 beyond the lock, at versions that agree with the lock's botocore and with the developers' lock."""
    image = (ROOT / "infra/Dockerfile").read_text()
    (words,) = re.findall(r"-r /build/requirements.lock (.+)$", image, re.MULTILINE)
    packages = dict(word.split("==") for word in words.split())
    assert {"boto3", "s3transfer"} == set(packages)
    assert [f"{name}=={version}" for name, version in packages.items()] == [
        line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if line.split("==")[0] in packages
    ]
    for name in packages:
        for needed in map(Requirement, metadata.requires(name) or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                version = (packages | locked())[canonicalize_name(needed.name)]
                assert needed.specifier.contains(version), f"{name} requires {needed}"
