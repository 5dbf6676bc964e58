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
    "config": 0.1,
    "configfile": 0.5,  # reads what config describes
    "rows": 0,
    "hosts": 0.3,  # refuses bad input
    "jsonl": 0.6,  # reads as configfile does
    "storage": 0.5,  # waits for the hosts
    "mesh": 1,
    "runlog": 1,
    "outfile": 1,
    "rundir": 1.5,  # writes with runlog
    "distributed": 1.5,
    "programs": 1,
    "corpus": 2,
    "hub": 2,
    "tokens": 3,
    "model": 4,
    "train": 5,
    "sample": 5,
    "evolve": 6,
    "eval": 7,
    "export": 8,
    "options": 1,
    "plan": 8,
    "bench": 8,
    "cli": 9,
    "__main__": 10,
}
NO_JAX = ("corpus", "tokens", "hub")  # and what those three rest on, see faults
ORACLES = ("torch", "trl", "peft")
MODULE_LINES, FUNCTION_LINES = 400, 100


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
            if top in ("jax", "flax", "jaxlib") and here in (
                *NO_JAX,
                "config",
                "configfile",
                "hosts",
                "rows",
                "runlog",
                "rundir",
            ):
                out.append(f"{name} imports {top}")
            if top != "esjax" or there == here:
                continue
            if not here:
                out.append(f"{name} imports {imported}")
            elif there and (there not in RANKS or RANKS[there] >= RANKS[here]):
                out.append(f"{name} (rank {RANKS[here]}) imports {imported} (rank {RANKS.get(there)})")
            if here == "model" and there in ("tokens", "corpus"):
                out.append(f"{name} imports {there}")
        out += sizes(name, source)
    return out


def sizes(name: str, source: str) -> list[str]:
    """Modules and functions that are too long."""
    lines = len(source.splitlines())
    out = [f"{name} has {lines} lines"] if lines >= MODULE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length >= FUNCTION_LINES:
                out.append(f"{name}.{node.name} has {length} lines")
    return out


def test_the_package_keeps_its_rules() -> None:
    assert faults(sources()) == []


def test_the_whole_package_was_read() -> None:
    modules = sources()
    assert {"esjax", "esjax.config", "esjax.tokens.encode", "esjax.evolve.rounds", "esjax.cli"} <= set(modules)
    assert {place(m) for m in modules} - {""} <= set(RANKS)
    seen = {m: imports(m, s, False, set(modules)) for m, s in modules.items()}
    assert {"esjax.rows", "esjax.errors", "esjax.tokens.tokenizer"} <= seen["esjax.tokens.encode"]
    assert {"esjax.evolve.lab", "esjax.runlog"} <= seen["esjax.cli"]  # imported inside functions
    assert any("jax" in found for found in seen.values())


GOOD = {
    "esjax": '"""The package."""\n',
    "esjax.config": "import yaml\n",
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
        ("config", "import esjax.runlog", "esjax.config (rank 0.1) imports esjax.runlog (rank 1)"),
        ("config", "from esjax import runlog", "esjax.config (rank 0.1) imports esjax.runlog (rank 1)"),
        ("corpus.sources", "from esjax.tokens.encode import Encoder", "esjax.corpus.sources (rank 2) imports"),
        ("corpus.sources", "from esjax.hub.fetch import resolve", "esjax.corpus.sources (rank 2) imports"),
        ("corpus.sources", "from ..tokens import encode", "esjax.corpus.sources (rank 2) imports"),
        ("corpus.sources", "import jax.numpy as jnp", "esjax.corpus.sources imports jax"),
        ("tokens.batches", "from flax import nnx", "esjax.tokens.batches imports flax"),
        ("hub.fetch", "from jax import Array", "esjax.hub.fetch imports jax"),
        ("runlog", "import jax", "esjax.runlog imports jax"),
        ("model.decoder", "from esjax.tokens import tokenizer", "esjax.model.decoder imports tokens"),
        ("model.decoder", "from esjax.corpus.dialogue import Message", "esjax.model.decoder imports corpus"),
        ("train.loop", "from esjax.sample.score import Scorer", "esjax.train.loop (rank 5) imports"),
        ("sample.score", "from esjax.train import losses", "esjax.sample.score (rank 5) imports"),
        ("evolve.rounds", "from esjax.eval.compare import compare", "esjax.evolve.rounds (rank 6) imports"),
        ("export", "import esjax.cli", "esjax.export (rank 8) imports esjax.cli (rank 9)"),
        ("model.weights", "import torch", "esjax.model.weights imports torch"),
        ("export", "from peft import LoraConfig", "esjax.export imports peft"),
        ("evolve.rounds", "from trl.trainer import DPOTrainer", "esjax.evolve.rounds imports trl"),
        ("export", "importlib.import_module('torch.nn')", "esjax.export imports torch"),
        ("export", "__import__('torch')", "esjax.export imports torch"),
        ("train.loop", "if TYPE_CHECKING:\n    from esjax.cli import main", "esjax.train.loop (rank 5) imports"),
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
    assert faults({"esjax": "from esjax.config import load\n"}) == ["esjax imports esjax.config"]


def test_long_modules_and_functions_are_reported() -> None:
    short = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 2)
    assert sizes("m", short) == []
    assert sizes("m", short + "    x = 1\n") == ["m.f has 100 lines"]
    inner = "class C:\n    async def g(self):\n" + "        x = 1\n" * FUNCTION_LINES
    assert sizes("m", inner) == ["m.g has 101 lines"]
    assert sizes("m", "x = 1\n" * (MODULE_LINES - 1)) == []
    assert sizes("m", "x = 1\n" * MODULE_LINES) == ["m has 400 lines"]
