"""The list of packages is complete, and a wheel carries everything that is needed to run."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages() -> list[str]:
    found: list[str] = PROJECT["tool"]["setuptools"]["packages"]
    return found


def test_the_package_list_equals_the_folders() -> None:
    folders = [path.parent for path in ROOT.rglob("__init__.py")]
    ours = {
        ".".join(["pdserve", *folder.relative_to(ROOT).parts])
        for folder in folders
        if not folder.relative_to(ROOT).parts[0].startswith((".", "build"))
    }
    assert sorted(packages()) == sorted(ours)


def test_every_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {text.partition(">=")[0].lower().replace("_", "-") for text in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"


def test_the_type_checkers_link_points_at_the_root() -> None:
    assert (ROOT / ".types" / "pdserve").resolve() == ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that git knows, outside the working tree."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "-o", str(out)],
        cwd=source, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_the_demo_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in packages():
        folder = ROOT.joinpath(*package.split(".")[1:])
        inside = package.replace(".", "/")
        for path in (
            path for ending in ("py", "c", "cu", "h") for path in folder.glob("*." + ending)
        ):
            assert f"{inside}/{path.name}" in names
    for path in (ROOT / "demo" / "model").iterdir():
        assert f"pdserve/demo/model/{path.name}" in names


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pdserve"}
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"pdserve = pdserve.cluster.main:main" in archive.read(entry)
