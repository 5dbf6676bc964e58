"""esjax: language models learn personal emotional support by self-evolution, natively in JAX.

What this package offers in Python is described in ``esjax.api`` and is imported when it is first asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esjax.api import dpo, evolve, load_config, open_model, sft, stop_on_sigterm, write_report

__version__ = "0.1.0"
__all__ = ["dpo", "evolve", "load_config", "open_model", "sft", "stop_on_sigterm", "write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("esjax.api"), name)
    raise AttributeError(f"module esjax has no attribute {name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Method(ModuleType):
    """``esjax.evolve`` is the package that holds the method, and, called, the function that runs it."""

    def __call__(self, config: Any, run_dir: Any) -> Any:
        return import_module("esjax.api").evolve(config, run_dir)


import_module("esjax.evolve")
sys.modules["esjax.evolve"].__class__ = _Method
