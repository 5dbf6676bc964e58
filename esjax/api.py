"""What ``import esjax`` offers: the method and its models, from Python. The command line calls the same.

Everything here may be called from a script or a notebook: what cannot be done raises an error of ``esjax.errors``
(``InputError``: no retry mends it; ``TransientError``: it may work later; ``RunError``: the run cannot go on), progress
appears on stderr or in the notebook, and no signal is handled outside of ``stop_on_sigterm``. Interrupted, the same
call with the same run directory or file continues. JAX is imported when something is computed, not before.

A chat is a list of messages, {"role": "system" | "user" | "assistant", "content": TEXT}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esjax.opened import devices, open_model
from esjax.runtime.context import open_runtime
from esjax.settings.files import load
from esjax.settings.schema import Config

if TYPE_CHECKING:
    from rich.table import Table

    from esjax.evolve.experiment import Experiment
    from esjax.run.directory import RunDir

__all__ = ["Run", "dpo", "evaluate", "evolve", "load_config", "open_model", "sft", "stop_on_sigterm", "write_report"]


def load_config(file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read an experiment's settings and check them.

    Args:
        file: a YAML file; the quickstart's config when left out.
        overrides: values to put over the file's, by dotted name.

    Raises:
        InputError: an unknown setting (with the nearest known one), a wrong type or value, settings that do not fit together.

    Example:
        >>> config = esjax.load_config("configs/llama3-8b.yaml", {"evolve.rounds": 1, "sft.learning_rate": 5e-5})
        >>> config.evolve.rounds
        1
    """
    return load(None if file is None else str(file), overrides or {})


@dataclass(frozen=True)
class Run:
    """A finished run of the method. Its models are ``open_model(f"{run.folder}:m0")``, ``m1``, ..."""

    folder: Path
    records: list[dict[str, Any]]  # the comparison on held-out dialogues: one a metric and model, with its differences

    @property
    def table(self) -> Table:
        """The models' headline metrics as a table of ``rich``, which notebooks render."""
        return self.tables()[0]

    @property
    def differences(self) -> Table:
        """The paired differences between the models, with intervals, in the same way."""
        return self.tables()[-1]

    def tables(self, all_metrics: bool = False) -> list[Table]:
        """Both, of the headline metrics or of all."""
        from esjax.eval.compare import title
        from esjax.eval.table import tables

        return tables(self.records, title, all_metrics)

    def value(self, metric: str, model: str) -> float:
        """The mean of a metric ("perplexity", "specificity", ...) of a model ("backbone", "m0", "m1", ...)."""
        return float(next(r["value"] for r in self.records if (r["metric"], r["model"]) == (metric, model)))


def evolve(config: Config, run_dir: str | Path, shared: str | Path | None = None) -> Run:
    """Run the whole method: phase 1 (M_0), all rounds of phase 2 (M_1, M_2, ...), and the comparison of the models.

    Resumable: stages that the run directory holds are not made again, and a stage that was interrupted goes on.

    Args:
        config: the settings, as ``load_config`` gives them.
        run_dir: a folder, made where it is not there, or a bucket's URL (gs://BUCKET/RUN).
        shared: a folder with finished stages: those that other runs with the same settings and data made are taken from it,
            and those that are made here are put into it.

    Raises:
        InputError: files, settings or a run directory that do not fit; nothing was trained then.
        TransientError: a network, a lock; the same call may work later.
        RunError: the run cannot go on, for example because the filters dropped every pair.

    Example:
        >>> run = esjax.evolve(config, "runs/a")
        >>> run.value("perplexity", "m2")
        >>> run.table
    """
    from esjax.eval.compare import check, compare
    from esjax.eval.judges.ask import rater
    from esjax.evolve import preflight, rounds
    from esjax.report import page
    from esjax.run.progress import say
    from esjax.runtime.programs import summary

    with _opened(config, run_dir, shared) as (experiment, run):
        preflight.check_evolve(experiment, run)
        check(experiment)
        rounds.evolve(experiment, run, rater(config))
        records = compare(experiment, run, run.path, config.evolve.rounds)
        say(summary())
        page.publish(run.path)
        return Run(run.path, records)


def sft(config: Config, run_dir: str | Path) -> Path:
    """Run phase 1 alone: supervised fine-tuning, which makes M_0; ``evolve`` continues from it.

    Returns the folder of M_0's adapter (PEFT's format); the model is ``open_model("RUN_DIR:m0")``. Arguments and errors as
    for ``evolve``.

    Example:
        >>> esjax.sft(config, "runs/a")
        PosixPath('runs/a/sft/adapter')
    """
    from esjax.evolve import phases, preflight
    from esjax.evolve.models import adapter_folder

    with _opened(config, run_dir) as (experiment, run):
        preflight.check_sft(experiment, run)
        phases.sft(experiment, run)
        return adapter_folder(run.path, 0)


def dpo(config: Config, run_dir: str | Path, pairs: str | Path, model: str | None = None) -> Path:
    """Run DPO alone on preference pairs; the model it starts from is also its reference.

    Args:
        config: the settings; to go on from a run's model, that run's (``load_config("RUN/config.yaml")``).
        run_dir: where to write.
        pairs: JSON Lines of {"prompt", "chosen", "rejected"}, each a list of messages (TRL's conversational format).
        model: "RUN_DIR:m0", "RUN_DIR:m1", ... to start from; the backbone with a new adapter when left out.

    Returns the folder of the adapter (PEFT's format). Errors as for ``evolve``; RunError also where training does not start
    at its reference.

    Example:
        >>> esjax.dpo(esjax.load_config("runs/a/config.yaml"), "runs/b", "pairs.jsonl", "runs/a:m0")
        PosixPath('runs/b/dpo/adapter')
    """
    from esjax.evolve import phases, preflight, references
    from esjax.evolve.experiment import start_of_dpo
    from esjax.evolve.filters import Filters
    from esjax.evolve.models import KEPT_AS
    from esjax.evolve.pairs import read_pairs, screened_pairs

    file = Path(pairs)
    read, _, _ = screened_pairs(read_pairs(file), Filters.load(config.filters, config.screen).screen)
    with _opened(config, run_dir) as (experiment, run):
        start, origin = start_of_dpo(model, experiment)
        preflight.check_dpo(experiment, run, read)
        scored = references.score_pairs(experiment, run, file, start, origin)
        phases.dpo(experiment, run, scored, "dpo", phases.Start(lambda: start, lambda: start))
        return run.path / "dpo" / KEPT_AS[config.train.what]


def evaluate(config: Config, run_dir: str | Path, out: str | Path | None = None) -> Run:
    """Compare the models of a run (and the backbone) on held-out dialogues, as ``evolve`` does at its end. Resumable.

    Args:
        config: the run's settings (``load_config("RUN/config.yaml")``), with other ones in ``reply``, ``eval`` and ``data.test``
            where ``out`` is given.
        run_dir: the run, a folder or a URL.
        out: a folder for replies and results; the run's own when left out.

    Returns the run with its records. Errors as for ``evolve``.

    Example:
        >>> other = esjax.load_config("runs/a/config.yaml", {"data.test": "esconv:test.json"})
        >>> esjax.evaluate(other, "runs/a", "evals/esconv").table
    """
    from esjax.eval.compare import check, compare, finished
    from esjax.run import buckets

    run = buckets.copied(str(run_dir))
    last = finished(run)
    with _opened(config, run_dir if out is None else out) as (experiment, home):
        home.check_base(experiment.identity, experiment.revision)
        check(experiment, run)
        return Run(home.path, compare(experiment, home, home.path if out is None else run, last))


def write_report(run_dir: str | Path, compare: Sequence[str | Path] = (), out: str | Path | None = None) -> Path:
    """Write what is to be seen of a run as one HTML page that needs no network: report.html. ``evolve`` does so at its end.

    Args:
        run_dir: the run, a folder or a URL, finished or not.
        compare: other runs to show beside it.
        out: the page; the run directory's report.html when left out.

    Returns the page's path. Raises InputError for what is no run, or a damaged file in it.

    Example:
        >>> esjax.write_report("runs/a", compare=["runs/b"], out="a-and-b.html")
    """
    from esjax.report.page import write

    return write([str(run_dir), *map(str, compare)], None if out is None else Path(out))


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM (a preemption) makes what runs save and raise ``esjax.errors.Stopped``; the same call continues.

    For jobs, and for their main thread: the process' signal handler is another one meanwhile.

    Example:
        >>> with esjax.stop_on_sigterm():
        ...     esjax.evolve(config, "runs/a")
    """
    with open_runtime():
        yield


@contextmanager
def _opened(
    config: Config, run_dir: str | Path, shared: str | Path | None = None
) -> Iterator[tuple[Experiment, RunDir]]:
    """An experiment and its run directory, on all devices. Raises InputError, TransientError."""
    from esjax.corpus.sources import content
    from esjax.evolve.experiment import Experiment
    from esjax.run.directory import RunDir
    from esjax.run.shared import Shared

    kept = None if shared is None else Shared(shared)
    with devices(config), RunDir(run_dir, config, content, kept) as run:
        yield Experiment.open(config), run
