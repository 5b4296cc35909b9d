"""The floors of the house: who may import whom, held over every form of import, also inside functions."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTER = ("plugins", "modes", "cnm_driver")

FLOORS: list[set[str]] = [  # from the ground up; a floor may import those before it, or itself
    {"towpath/__init__", "towpath/model", "towpath/errors"},
    {
        "towpath/plan",
        "towpath/schema",
        "towpath/ranges",
        "towpath/config",
        "towpath/store",
        "towpath/logs",
        "towpath/notify",
        "towpath/timings",
    },
    {"towpath/mode", "towpath/ipam", "towpath/hostlocal", "towpath/parts", "towpath/kernel"},
    {
        "towpath/attach",
        "towpath/checking",
        "towpath/claims",
        "towpath/networks",
        "towpath/keylock",
        "towpath/unbroken",
        "towpath/reconcile",
        "modes",
    },
    {"towpath/overlay"},
    {"towpath/api", "cnm_driver", "plugins"},
    {"towpath/agent", "towpath/cni_once", "towpath/install"},
    {"towpath/cli"},
]
NEVER = [
    ("modes", "towpath/store"),
    ("towpath/model", "towpath/kernel"),
    ("towpath/plan", "towpath/kernel"),
    ("towpath/store", "towpath/attach"),
    ("towpath/kernel", "towpath/store"),
    ("plugins", "towpath"),
]
ALLOWED = {  # with the reason
    ("modes", "towpath/kernel/contract"): "what was seen is plain data, read by check",
    ("towpath/mode", "towpath/kernel/contract"): "the same",
}


def room(module: str) -> str:
    """`towpath/kernel/apply` → `towpath/kernel`; `modes/bridge` → `modes`."""
    parts = module.split("/")
    return parts[0] if parts[0] in OUTER else "/".join(parts[:2])


def floor(module: str) -> int:
    for height, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return height
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def sources() -> Iterator[Path]:
    for top in ("towpath", *OUTER):
        yield from (p for p in sorted((ROOT / top).rglob("*.py")))


def resolve(dotted: str) -> str:
    """An import as a path in the checkout, "" where it is not ours. `towpath.modes.x` is `modes/x`."""
    parts = dotted.split(".")
    if parts[0] != "towpath":
        return ""
    if len(parts) > 1 and parts[1] in OUTER:
        parts = parts[1:]
    return "/".join(parts) if len(parts) > 1 else "towpath/__init__"


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports, relative forms resolved."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = ("towpath", *here[:-1]) if here[0] in OUTER else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from filter(None, (resolve(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            for alias in node.names:
                inner = resolve(f"{module}.{alias.name}")
                known = (ROOT / f"{inner}.py").exists() or (ROOT / inner / "__init__.py").exists()
                if found := inner if inner and known else resolve(module):
                    yield found


def edges() -> Iterator[tuple[str, str]]:
    for path in sources():
        module = "/".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("/__init__")
        module = "towpath/__init__" if module == "towpath" else module
        for target in imports(path):
            yield module, target


def allowed(module: str, target: str) -> bool:
    return any(module.startswith(a) and target.startswith(b) for a, b in ALLOWED)


def test_no_import_runs_upstairs() -> None:
    upstairs = [f"{m} imports {t}" for m, t in edges() if floor(t) > floor(m) and not allowed(m, t)]
    assert not upstairs


def test_the_nevers_hold() -> None:
    broken = [
        f"{m} imports {t}"
        for m, t in edges()
        for a, b in NEVER
        if m.startswith(a) and t.startswith(b) and not allowed(m, t)
    ]
    assert not broken


def test_an_upstairs_import_would_be_seen(tmp_path: Path) -> None:
    path = ROOT / "towpath" / "store" / "contract.py"
    assert "towpath/errors" in set(imports(path))
    assert floor("towpath/attach") > floor("towpath/store/contract")


def test_packages_of_setup_cfg_are_the_folders() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = set()
    for init in [*(ROOT / "towpath").rglob("__init__.py"), *(ROOT / top / "__init__.py" for top in OUTER)]:
        dotted = ".".join(init.parent.relative_to(ROOT).parts)
        found.add(f"towpath.{dotted}" if dotted.split(".")[0] in OUTER else dotted)
    assert listed == found


@pytest.mark.parametrize("group", ["towpath.modes", "console_scripts"])
def test_every_entry_point_loads(group: str) -> None:
    code = (
        "from importlib.metadata import distribution\n"
        f"points = [p for p in distribution('towpath').entry_points if p.group == {group!r}]\n"
        "assert points\n"
        "[p.load() for p in points]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
