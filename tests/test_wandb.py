"""The numbers of training at Weights & Biases, whose library is stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esjax.errors import InputError
from esjax.run.metrics import Metrics, check_tracked


def test_numbers_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that settings name gets each step; a phase that goes on is the same run there."""
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(**how: Any) -> Any:
        begun.append(how)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: begun.append({}))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=ValueError, __spec__=object()))
    for _ in range(2):
        metrics = Metrics(tmp_path / "run" / "round1" / "dpo" / "metrics.jsonl", tmp_path / "board", "mine")
        metrics.path.parent.mkdir(parents=True, exist_ok=True)
        metrics.log(3, loss=0.5)
        metrics.close()
    first, ended, again, _ = begun
    assert (first["project"], first["name"], first["group"]) == ("mine", "run/round1-dpo", "run")
    assert first == again
    assert ended == {}
    assert logged == [(3, {"loss": 0.5})] * 2
    Metrics(tmp_path / "metrics.jsonl", tmp_path / "board").close()
    assert len(begun) == 4  # nothing is begun where no project is named
    monkeypatch.setattr("esjax.run.metrics.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train\.wandb=mine: needs esjax's wandb extra"):
        check_tracked("mine")
    check_tracked(None)
