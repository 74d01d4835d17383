"""Who may import whom: the table of ARCHITECTURE.md §2, checked on the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORKER_PARTS = {"cluster", "engine", "kernels", "kv_transfer", "protocol"}
TABLE = {
    "protocol": set(),
    "cluster": {"protocol"},
    "router": {"protocol", "cluster", "parsers"},
    "parsers": set(),
    "kernels": set(),
    "engine": {"kernels", "protocol"},
    "kv_transfer": {"kernels", "protocol"},
    "worker": WORKER_PARTS,
    "prefill_worker": WORKER_PARTS | {"worker"},
    "decode_worker": WORKER_PARTS | {"worker"},
    "demo": set(),
    "bench": {"router", "cluster", "engine", "kernels", "kv_transfer", "protocol"},
}
LIGHT = ("protocol", "cluster", "router", "parsers")
"""Never torch, not even late."""
PLAIN = ("engine/request.py", "engine/blocks.py", "engine/scheduler.py", "engine/ports.py")
"""Decide with integers alone."""
HEAVY = {"torch", "triton", "cupy", "safetensors"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, not relative"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def outer(name: str) -> str:
    return name.partition(".")[0]


def test_the_table_has_every_package() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(TABLE)


@pytest.mark.parametrize("folder", TABLE)
def test_imports_only_what_the_table_allows(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for line, name in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "pdserve"
                and len(parts) > 1
                and parts[1] not in {folder, *TABLE[folder]}
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            if parts[0] in TABLE and parts[0] != "kernels":
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} without `pdserve.`")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", LIGHT)
def test_light_folders_import_nothing_heavy(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imports(path)
        if outer(name) in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_protocol_needs_msgspec_and_xxhash_alone() -> None:
    found = {outer(name) for path in sources("protocol") for _, name in imports(path)}
    assert found - sys.stdlib_module_names == {"msgspec", "pdserve", "xxhash"}


@pytest.mark.parametrize("file", PLAIN)
def test_scheduling_knows_no_tensors(file: str) -> None:
    found = {outer(name) for _, name in imports(ROOT / file)}
    assert not found & (HEAVY | {"numpy"})


@pytest.mark.parametrize(
    "module", ["pdserve.router.app", "pdserve.cluster.main", "pdserve.cluster.launcher"]
)
def test_light_processes_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({HEAVY} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{module} loads {done.stderr}"
