"""Pages of the repository itself: links lead somewhere; the log is dated, newest first, with a commit a line."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/log.md"])
def test_links_of_a_page_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_targets_and_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)


def test_the_log_is_newest_first_and_every_finding_names_its_commit():
    text = (ROOT / "docs/log.md").read_text()
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert dates and dates == sorted(dates, reverse=True)
    findings = re.split(r"^- ", re.sub(r"^## .*$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]
    assert len(findings) > 10 and any("**No good:**" in finding for finding in findings)
    for finding in findings:
        assert re.search(r"\d", finding) and re.search(r"`[0-9a-f]{7}`\s*$", finding), finding


def test_the_logs_commits_are_of_their_day():
    if not (ROOT / ".git").exists():
        pytest.skip("no history here")
    for part in re.split(r"^## ", (ROOT / "docs/log.md").read_text(), flags=re.MULTILINE)[1:]:
        for commit in set(re.findall(r"`([0-9a-f]{7})`", part)):
            found = subprocess.run(
                ["git", "-C", ROOT, "show", "-s", "--format=%ad", "--date=short", commit],
                capture_output=True,
                text=True,
            )
            if found.returncode:  # a shallow clone
                continue
            assert found.stdout.strip() == part[:10], commit
