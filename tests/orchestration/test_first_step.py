"""docs/first-step.md: every step of the guide is there, with a test that exists or the words "not run here"; and the
guide says all that the chart asks for."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from helm_chart import render

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/first-step.md"
GUIDE = (ROOT / "docs/cluster.md").read_text()


def rows() -> list[list[str]]:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def section(title: str) -> str:
    """One section of the guide."""
    return GUIDE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def guide_values():
    (text,) = blocks(section("Kubernetes with KubeRay"), "yaml")
    return yaml.safe_load(text)


def test_every_row_names_a_test_that_exists_or_says_that_it_was_not_run():
    shown = 0
    for step, what, by in rows():
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", by)
        assert tests or by == "not run here", f"{step} {what}: {by}"
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"no {file}::{name}"
            shown += 1
    assert shown > 20


def is_of(step: str, command: str) -> bool:
    """Whether a command has the words of a step, in their order."""
    words = iter(command.split())
    return command.split()[0] == step.split()[0] and all(word in words for word in step.split())


def test_every_command_of_the_guide_is_a_step():
    steps = [code for step, _, _ in rows() for code in re.findall(r"`([^`]+)`", step)]
    commands = []
    for text in (section("Image"), section("Kubernetes with KubeRay")):
        for block in blocks(text, "console"):
            lines = re.sub(r"=\$\(.*?\)$", " ", block.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
            commands += [part for line in lines for part in line.split(" | ")]
    assert len(commands) > 12
    for command in commands:
        assert any(is_of(step, command) for step in steps), f"{PAGE.name} has no step for: {command}"
    for step in steps:
        assert any(is_of(step, command) for command in commands), f"the guide has no command for the step {step}"


def test_every_kind_of_object_is_a_step():
    steps = " ".join(step for step, _, _ in rows())
    values = {**guide_values(), "job": {"enabled": True}}
    for kind, _ in render(values):
        assert kind in steps, kind


def test_the_guides_values_render():
    objects = render(guide_values())
    assert ("RayCluster", "latentzoom") in objects and ("Deployment", "latentzoom-mlflow") in objects


def test_the_guide_makes_every_secret_that_a_pod_asks_for():
    """Names and keys, in the rendering of the guide's own values."""
    text = " ".join(blocks(section("Kubernetes with KubeRay"), "console")).replace("\\\n", " ")
    made = {
        name: set(re.findall(r"--from-literal=(\w+)=", line))
        for name, line in re.findall(r"create secret generic (\S+)(.*)$", text, re.MULTILINE)
    }
    rendered = yaml.safe_dump_all(list(render(guide_values()).values()))
    asked = set(re.findall(r"secretRef:\s+name: (\S+)", rendered))
    keys = set(re.findall(r"secretKeyRef:\s+key: (\S+)\s+name: (\S+)", rendered))
    assert asked and asked <= set(made)
    assert keys and all(key in made[name] for key, name in keys)
    assert {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} <= made["latentzoom-mlflow"]
    assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= made["latentzoom-env"]
