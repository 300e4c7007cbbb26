"""What a release says about itself, in all places the same; and what a fresh clone installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import cake_hf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def pinned(name: str) -> dict[str, set[str]]:
    """Package -> its versions in a lock; several where they depend on the platform."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;]+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_all_files_name_the_same_version() -> None:
    assert PROJECT["version"] == cake_hf.__version__ == CITATION["version"]
    dated = re.findall(r"^## \[(.+?)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dated[0] == (PROJECT["version"], CITATION["date-released"])


def test_all_project_urls_start_with_the_homepage() -> None:
    urls = PROJECT["urls"]
    assert urls.keys() >= {"Homepage", "Documentation", "Changelog", "Issues", "Security"}
    assert {url.startswith(urls["Homepage"]) for name, url in urls.items() if name != "Paper"} == {True}
    assert CITATION["repository-code"] == urls["Homepage"]


def test_authors_and_licence_agree_with_the_citation() -> None:
    assert PROJECT["authors"] == [{"name": CITATION["authors"][0]["name"]}]
    assert any(line.startswith("Programming Language :: Python :: 3.11") for line in PROJECT["classifiers"])
    assert not any(line.startswith("License ::") for line in PROJECT["classifiers"])  # the licence expression says it
    assert (CITATION["license"], PROJECT["license"]) == ("Apache-2.0", "Apache-2.0")


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_reports_need_no_persons_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "Report a vulnerability" in text
    assert not re.search(r"[\w.+-]+@[\w-]+\.\w+", text)


def test_the_demo_installs_what_it_needs() -> None:
    demo, locked = pinned("demo"), pinned("locked")
    assert len(demo) < len(locked) / 2
    assert {name: versions for name, versions in demo.items() if locked.get(name) != versions} == {}
    needed = {re.split(r"[<>=!; \[]", text)[0] for text in PROJECT["dependencies"]}
    assert needed <= demo.keys()
    assert not demo.keys() & {"pytest", "datasets", "obstore", "redis", "sphinx", "matplotlib", "moto", "peft"}


def test_the_hosted_checks_are_those_that_anybody_can_run() -> None:
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"push", "pull_request"} <= checks[True].keys()  # YAML reads "on" as true
    [job] = checks["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_every_environment_finds_the_small_torch() -> None:
    for script in ("setup.sh", "wheel_check.sh"):
        text = (ROOT / "scripts" / script).read_text()
        assert "cpu_torch.sh" in text
        assert "cpu_torch " in text
    assert "download.pytorch.org/whl/cpu" in (ROOT / "scripts" / "cpu_torch.sh").read_text()
