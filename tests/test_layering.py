"""Imports go one way, some libraries stay out, and modules and functions stay small: read from the sources with ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import esjax

PACKAGE = Path(esjax.__file__).parent
# Design, section 2: a module imports only from lower ranks or from its own package.
RANKS = {
    "errors": 0,
    "rows": 0,
    "settings": 1,
    "runtime": 2,
    "run": 3,
    "hub": 4,
    "corpus": 5,
    "safety": 6,
    "tokens": 7,
    "model": 8,
    "train": 9,
    "sample": 9,
    "evolve": 10,
    "eval": 11,
    "report": 12,
    "plan": 12,
    "bench": 13,
    "export": 12,
    "opened": 13,
    "data": 13,
    "evaluations": 14,
    "serve": 14,
    "options": 13,
    "parser": 14,
    "api": 14,
    "study": 15,
    "cli": 16,
    "__main__": 17,
}
NO_JAX = (
    "errors",
    "rows",
    "settings",
    "run",
    "corpus",
    "hub",
    "safety",
    "tokens",
    "esjax.runtime.processes",
    "esjax.runtime.stop",
    "esjax.runtime.context",
    "esjax.runtime.pages",
)
LAZY = ("api", "evolve")  # what esjax itself imports: the first when it is asked for, the second is a name alone
ORACLES = ("torch", "trl", "peft")
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 350, 80, 6


def sources() -> dict[str, str]:
    """All modules of the package, by dotted name."""
    out = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("esjax", *file.relative_to(PACKAGE).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return out


def imports(name: str, source: str, package: bool, known: set[str]) -> set[str]:
    """Everything that a module imports, by dotted name, also inside functions and through import_module("...")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = name.split(".")
                home = home[: len(home) - node.level + package]
                base = ".".join([*home, *([base] if base else [])])
            # ``from esjax import rows`` and ``from esjax.hub import fetch`` name modules, not only what is in them.
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found |= (whole & known) or {base}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def place(module: str) -> str:
    """The file or package directly under esjax that a module belongs to; "" for esjax itself."""
    return [*module.split("."), ""][1]


def faults(modules: dict[str, str]) -> list[str]:
    """What in these modules breaks a rule."""
    known = set(modules) | {f"esjax.{n}" for n in RANKS}
    out = []
    for name, source in modules.items():
        package = any(other.startswith(name + ".") for other in modules)
        here = place(name)
        if here and here not in RANKS:
            out.append(f"{name} has no rank")
            continue
        for imported in sorted(imports(name, source, package, known)):
            top, there = imported.split(".")[0], place(imported)
            if top in ORACLES:
                out.append(f"{name} imports {top}")
            if top in ("jax", "flax", "jaxlib") and {here, name} & set(NO_JAX):
                out.append(f"{name} imports {top}")
            if top != "esjax" or there == here:
                continue
            if not here and there not in LAZY:
                out.append(f"{name} imports {imported}")
            elif here and there and (there not in RANKS or RANKS[there] >= RANKS[here]):
                out.append(f"{name} (rank {RANKS[here]}) imports {imported} (rank {RANKS.get(there)})")
            if here == "model" and there in ("tokens", "corpus"):
                out.append(f"{name} imports {there}")
        out += sizes(name, source)
    return out


def sizes(name: str, source: str) -> list[str]:
    """Modules and functions that are too long, and functions with too many parameters."""
    lines = len(source.splitlines())
    out = [f"{name} has {lines} lines"] if lines > MODULE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            given = node.args
            parameters = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
            if length > FUNCTION_LINES:
                out.append(f"{name}.{node.name} has {length} lines")
            if parameters - (given.args[:1] != [] and given.args[0].arg in ("self", "cls")) > PARAMETERS:
                out.append(f"{name}.{node.name} has {parameters} parameters")
    return out


def test_the_package_keeps_its_rules() -> None:
    assert faults(sources()) == []


def test_the_whole_package_was_read() -> None:
    modules = sources()
    assert {"esjax", "esjax.settings.schema", "esjax.tokens.encode", "esjax.evolve.rounds", "esjax.cli"} <= set(modules)
    assert {place(m) for m in modules} - {""} <= set(RANKS)
    seen = {m: imports(m, s, False, set(modules)) for m, s in modules.items()}
    assert {"esjax.rows", "esjax.errors", "esjax.tokens.tokenizer"} <= seen["esjax.tokens.encode"]
    assert {"esjax.evolve.experiment", "esjax.run.directory"} <= seen["esjax.api"]  # imported inside functions
    assert any("jax" in found for found in seen.values())


GOOD = {
    "esjax": '"""The package."""\n',
    "esjax.settings.schema": "import yaml\n",
    "esjax.tokens": "",
    "esjax.tokens.encode": "from esjax import rows\nfrom esjax.tokens import batches\nfrom . import batches\n",
    "esjax.tokens.batches": "import numpy\n",
    "esjax.train.loop": "import jax\nfrom esjax.model.lora import Adapter\nimport esjax\n",
    "esjax.evolve": "",
    "esjax.evolve.pairs": "from ..sample import score\nfrom .filters import Filters\n",
}


def test_good_sources_have_no_faults() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("module", "line", "reported"),
    [
        (
            "settings.schema",
            "import esjax.run.files",
            "esjax.settings.schema (rank 1) imports esjax.run.files (rank 3)",
        ),
        ("settings.schema", "from esjax.run import files", "esjax.settings.schema (rank 1) imports esjax.run (rank 3)"),
        ("corpus.sources", "from esjax.safety.screen import Screen", "esjax.corpus.sources (rank 5) imports"),
        ("corpus.sources", "from ..tokens import encode", "esjax.corpus.sources (rank 5) imports"),
        ("corpus.sources", "import jax.numpy as jnp", "esjax.corpus.sources imports jax"),
        ("tokens.batches", "from flax import nnx", "esjax.tokens.batches imports flax"),
        ("runtime.processes", "import jax", "esjax.runtime.processes imports jax"),
        ("model.decoder", "from esjax.tokens import tokenizer", "esjax.model.decoder imports tokens"),
        ("model.decoder", "from esjax.corpus.dialogue import Message", "esjax.model.decoder imports corpus"),
        ("train.loop", "from esjax.sample.score import Scorer", "esjax.train.loop (rank 9) imports"),
        ("sample.score", "from esjax.train import losses", "esjax.sample.score (rank 9) imports"),
        ("export", "import esjax.cli", "esjax.export (rank 12) imports esjax.cli (rank 16)"),
        ("model.weights", "import torch", "esjax.model.weights imports torch"),
        ("evolve.rounds", "from trl.trainer import DPOTrainer", "esjax.evolve.rounds imports trl"),
        ("export", "importlib.import_module('torch.nn')", "esjax.export imports torch"),
        ("export", "__import__('torch')", "esjax.export imports torch"),
        ("train.loop", "if TYPE_CHECKING:\n    from esjax.cli import main", "esjax.train.loop (rank 9) imports"),
        ("evolve.rounds", "from esjax.nowhere import thing", "imports esjax.nowhere (rank None)"),
        ("helpers", "", "esjax.helpers has no rank"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a function"])
def test_each_broken_rule_is_reported(module: str, line: str, reported: str, inside: bool) -> None:
    source = line
    if inside:
        body = "\n".join("    " + x for x in (line or "pass").splitlines())
        source = f"def f():\n{body}\n"
    found = faults({f"esjax.{module}": source})
    assert any(reported in f for f in found), found


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert faults({"esjax": "from esjax.settings.schema import load\n"}) == ["esjax imports esjax.settings.schema"]


def test_long_modules_and_functions_and_many_parameters_are_reported() -> None:
    short = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
    assert sizes("m", short) == []
    assert sizes("m", short + "    x = 1\n") == [f"m.f has {FUNCTION_LINES + 1} lines"]
    inner = "class C:\n    async def g(self):\n" + "        x = 1\n" * FUNCTION_LINES
    assert sizes("m", inner) == [f"m.g has {FUNCTION_LINES + 1} lines"]
    assert sizes("m", "x = 1\n" * MODULE_LINES) == []
    assert sizes("m", "x = 1\n" * (MODULE_LINES + 1)) == [f"m has {MODULE_LINES + 1} lines"]
    most = ", ".join(f"p{i}" for i in range(PARAMETERS))
    assert sizes("m", f"class C:\n    def g(self, {most}): ...\ndef f({most}): ...\n") == []
    assert sizes("m", f"def f({most}, *, one): ...\n") == [f"m.f has {PARAMETERS + 1} parameters"]
