"""What the code must stay, read from its syntax: arrows point one way, public things are explained, nothing
outside is named."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "picotron_mini"
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From what all may import to what nobody may. A unit imports units of lower levels, and itself.
LEVELS = {
    "config": 0,
    "expert_legality": 1,
    "legality": 1,
    "presets": 1,
    "mesh": 1,
    "collectives": 1,
    "launch": 1,
    "layout": 1,
    "model": 1,
    "data": 1,
    "reference": 2,
    "memory": 2,
    "moe": 2,
    "parallel": 3,
    "training": 4,
    "monitoring": 4,
    "parity": 5,
    "measure": 5,
    "dry_run": 5,
    "write": 5,
    "verify": 6,
    "calibrate": 6,
    "matrix": 7,
    "bench": 7,
    "ready": 7,
    "planner": 7,
    "record": 8,
    "verify_all": 8,
    "course": 9,
    "train": 9,
    "flags": 9,
    "cli": 10,
    "__main__": 11,
}
HOSTS = {  # pages of papers and of what is talked about; never where packages come from
    "arxiv.org",
    "download.pytorch.org",  # the README's CPU build of torch
    "example.org",  # nobody's
    "localhost",
    "127.0.0.1",
    # names of XML and picture formats, which nothing fetches
    "www.w3.org",
    "purl.org",
    "creativecommons.org",
    "matplotlib.org",
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it runs, wherever in it, as absolute dotted names."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    unseen = {id(node) for block in for_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{module}.{name.name}" for name in node.names}
            found |= names if names <= set(MODULES) else names | {module}  # a package's modules are not taken from it
    return found


def unit(module: str) -> str:
    """`picotron_mini.parallel.data` -> `parallel`; empty for the package itself and for others'."""
    parts = module.split(".")
    return parts[1] if parts[0] == "picotron_mini" and len(parts) > 1 else ""


def library(module: str) -> set[str]:
    """The modules of the library that a module imports."""
    return {name for name in imports(MODULES[module]) if name in MODULES and name not in ("picotron_mini", module)}


def test_every_unit_has_a_level() -> None:
    assert {unit(module) for module in MODULES if unit(module)} <= set(LEVELS)


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module)])
def test_imports_point_one_way(module: str) -> None:
    mine = unit(module)
    wrong = [
        name
        for name in library(module)
        if unit(name) != mine
        and LEVELS[unit(name)] >= LEVELS[mine]
        and not (LEVELS[mine] == 1 and LEVELS[unit(name)] == 1)
    ]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_no_two_modules_import_each_other() -> None:
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in done:
            for name in sorted(library(module)):
                walk(name, (*above, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


def test_the_model_knows_nothing_of_parallelism() -> None:
    for module, path in MODULES.items():
        if unit(module) != "model":
            continue
        assert {unit(name) for name in library(module)} <= {"config", "model"}, module
        assert not any(name.startswith("torch.distributed") for name in imports(path)), module
        assert "environ" not in path.read_text(), module


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    assert {unit(name) for name in library("picotron_mini.reference")} <= {"config", "model"}


def test_only_the_command_line_imports_train() -> None:
    assert not [m for m in MODULES if "picotron_mini.train" in library(m) and unit(m) not in ("cli", "train")]


def test_bytes_are_predicted_without_the_code_that_counts_them() -> None:
    assert "collectives" not in {unit(name) for name in library("picotron_mini.parallel.traffic")}


def test_only_the_tensor_parallel_plan_and_its_price_know_the_parameters_names() -> None:
    for module, path in MODULES.items():
        if unit(module) not in ("parallel", "training", "layout") or module.endswith((".tensor", ".traffic")):
            continue
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        ]
        named = [
            text for text in strings if re.search(r"\b(attention|mlp)\.|\b[qkvo]\.weight|(gate|up|down)\.weight", text)
        ]
        assert not named, f"{module} names {named}"


@pytest.mark.parametrize("module", list(MODULES))
def test_public_things_are_explained(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    mute = [] if ast.get_docstring(tree) else ["the module"]
    mute += [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not mute, f"{module}: no docstring: {', '.join(mute)}"


def files() -> list[Path]:
    """The project's own files: those that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_nothing_outside_is_named() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for url in re.findall(r"https?://[^\s\"'`<>)\]}|]+", text):
            host = urlsplit(url).hostname or ""
            if host and host not in HOSTS and "{" not in host and "$" not in host:
                found.append(f"{path.relative_to(ROOT)}: {host}")
        for place in re.findall(r"(?<![\w.~*{}/-])/(?:root|work|home|Users|opt)/[\w.-]+", text):
            found.append(f"{path.relative_to(ROOT)}: {place}")
    assert not found, "\n".join(sorted(set(found)))


def test_every_folder_of_the_library_is_a_package() -> None:
    """Without an `__init__.py` a folder is not installed with the rest, and the site does not find it."""
    folders = {path.parent for path in (ROOT / "picotron_mini").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
