"""What a report shows of a run, read from its directory: finished, interrupted, or still going on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.sources import read
from esjax.errors import InputError, TransientError
from esjax.eval.results import read_parquet
from esjax.run.jsonl import read_jsonl
from esjax.run.manifest import read_manifest
from esjax.settings.files import flat, load
from esjax.settings.schema import Config

Row = dict[str, Any]
KINDS = ("drafts", "reflections", "refinements")
KEPT = "kept"
PROBLEMS = (InputError, TransientError)  # of a corpus that is not at hand where the report is made


def gather(runs: Mapping[str, Path]) -> Row:
    """All that the page shows of one run, or of several beside each other, by the names that the page calls them.

    Models of several runs are called RUN/m1. Raises InputError for a folder that is no run, or a damaged file in it.
    """
    several = len(runs) > 1
    made = [_run(name, path) for name, path in runs.items()]
    examples = Examples()
    for run, path in zip(made, runs.values(), strict=True):
        prefix = f"{run['name']}/" if several else ""
        trained, people, run["unlabelled"] = _people(load(str(path / "config.yaml"), [], together=False))
        examples.add(path, prefix, trained, people)
        for record in run["records"]:
            record["model"], record["differences"] = _renamed(record, prefix)
        for talk in run["talks"]:
            talk["model"] = prefix + talk["model"]
            talk["opening"] = people[talk["id"]].turns[0].text if talk["id"] in people else ""
    return {"runs": made, "examples": examples.rows(), "messages": list(examples.messages)}


def state(runs: Iterable[Path]) -> str:
    """Changes whenever something that a report shows does: sizes and times of the files."""
    files = sorted(f for run in runs for f in _shown(run))
    return json.dumps([(str(f), s.st_size, s.st_mtime_ns) for f in files if (s := f.stat())])


def _shown(run: Path) -> list[Path]:
    patterns = ("manifest.json", "*/*.json*", "*/*.parquet", "round*/dpo/metrics.jsonl")
    return [file for pattern in patterns for file in run.glob(pattern)]


def _renamed(record: Row, prefix: str) -> tuple[str, Row]:
    return prefix + record["model"], {prefix + other: d for other, d in record["differences"].items()}


def _run(name: str, path: Path) -> Row:
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run directory (no config.yaml in it); give one that `esjax evolve` has begun")
    config = load(str(path / "config.yaml"), [], together=False)
    stages = read_manifest(path)["stages"]
    results = path / "eval" / "results.json"
    records = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    return {
        "name": name,
        "settings": {
            key: value if value is None else str(value) for key, value in flat(config.model_dump(mode="json"))
        },
        "stages": [_stage(path, stage, entry) for stage, entry in stages.items()],
        "curves": [c for phase in _phases(path) if (c := _curve(path, phase, config))],
        "records": records,
        "talks": [talk for file in sorted(path.glob("eval/*.talks.jsonl")) for talk in _talks(file)],
        "screened": _rows(path / "screened.jsonl"),
        "versions": next((s["versions"] for s in reversed(stages.values()) if "versions" in s), {}),
        "base": read_manifest(path).get("base", {}),
    }


def _phases(path: Path) -> list[str]:
    rounds = sorted((p for p in path.glob("round*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    return ["sft", *(f"{r.name}/dpo" for r in rounds), "dpo"]


def _stage(path: Path, name: str, entry: Row) -> Row:
    """A stage with what it counted; of one that goes on, how many rows each of its files has so far."""
    bookkeeping = {"inputs", "outputs", "settings", "versions", "makes", "status", "seconds"}
    made = {"name": name, "status": entry["status"], "seconds": entry.get("seconds")}
    made["facts"] = {k: v for k, v in entry.items() if k not in bookkeeping}
    if entry["status"] != "done":
        parts = [path / place for place in entry.get("makes", [])]
        parts = [p.with_name(p.name + ".part") for p in parts]
        made["so_far"] = {p.name.removesuffix(".jsonl.part"): p.read_bytes().count(b"\n") for p in parts if p.is_file()}
    return made


def _curve(path: Path, phase: str, config: Config) -> Row | None:
    """The numbers of a training phase by step, and of DPO how far the log-probs moved from the reference, in nats."""
    rows = _lines(path / phase / "metrics.jsonl")
    if not rows:
        return None
    series: dict[str, list[float | None]] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        series[key] = [row.get(key) for row in rows]
    for side in ("chosen", "rejected"):
        if rewards := series.get(f"{side}_reward"):
            series[f"{side}_moved"] = [None if x is None else x / config.dpo.beta for x in rewards]
    return {"phase": phase, "step": [row["step"] for row in rows], "series": series}


def _lines(file: Path) -> list[Row]:
    """Whole rows of a file that may be growing, or that a kill may have cut."""
    rows: list[Row] = []
    for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
        with suppress(ValueError):
            if line.endswith(b"\n") and isinstance(row := json.loads(line), dict) and "step" in row:
                rows.append(row)
    return rows


def _rows(file: Path) -> list[Row]:
    return [dict(row) for row in read_jsonl(file)] if file.is_file() else []


def _talks(file: Path) -> list[Row]:
    talks: dict[str, Row] = {}
    for row in _rows(file):
        talk = talks.setdefault(
            row["id"], {"model": file.name.split(".")[0], "id": row["id"], "opening": "", "steps": []}
        )
        talk["steps"].append({k: row[k] for k in ("kind", "value", "text") if k in row})
    return list(talks.values())


People = Mapping[str, Dialogue]


def _people(config: Config) -> tuple[People, People, str]:
    """The dialogues that are trained on and evaluated, by id, where they are at hand, and else why they are not."""
    try:
        corpora = [read(source, config.data.format, config.seed) for source in (config.data.train, config.data.test)]
    except PROBLEMS as error:
        return {}, {}, str(error)
    trained, tested = ({d.id: d for d in corpus.dialogues} for corpus in corpora)
    return trained, tested, ""


class Examples:
    """Contexts with all that was made of them: drafts, reflections, refinements, and replies of the models.

    The messages of contexts stand once: an example names them by number, as contexts of one dialogue begin alike.
    """

    def __init__(self) -> None:
        self.messages: dict[tuple[str, str], int] = {}  # (role, text) -> number
        self._made: dict[tuple[str, ...], Row] = {}  # by corpus, id and newest message, as two corpora may number alike
        self._named: Counter[str] = Counter()

    def rows(self) -> list[Row]:
        """One a context, those that were answered in the evaluation first."""
        rows = list(self._made.values())
        return [r for r in rows if r["replies"]] + [r for r in rows if not r["replies"]]

    def add(self, path: Path, prefix: str, trained: People, tested: People) -> None:
        """Those of a run, whose models and rounds the page calls by their names behind ``prefix``."""
        for phase in _phases(path):
            if phase.endswith("/dpo"):
                self._round(path / phase.removesuffix("/dpo"), prefix, trained)
        answered: dict[str, Row] = {}
        for file in sorted(path.glob("eval/*.jsonl"), key=lambda f: ("." in f.stem, f.stem != "backbone", f.stem)):
            model, _, kind = file.stem.partition(".")
            for row in _rows(file) if not kind or kind == "reflections" else ():
                if kind:
                    answered[row["id"]]["inferred"][prefix + model] = row["reflection"]
                else:
                    example = answered[row["id"]] = self._example("test", row, row["messages"], tested)
                    example["reference"] = row["reference"]
                    example["replies"][prefix + model] = row["prediction"]
        if (table := path / "eval" / "results.parquet").is_file():
            for value in read_parquet(table):
                if value.context in answered:
                    metrics = answered[value.context]["metrics"].setdefault(prefix + value.model, {})
                    metrics[value.metric] = round(value.value, 4)

    def _example(self, corpus: str, row: Row, chat: Sequence[Mapping[str, str]], people: People) -> Row:
        key = (corpus, row["id"], chat[-1]["content"])
        if key not in self._made:
            self._named[row["id"]] += 1
            number = self._named[row["id"]]
            made = {"id": row["id"] if number == 1 else f"{row['id']} ({number})", "context": self._numbers(chat)}
            made |= {"reference": "", "rounds": [], "replies": {}, "inferred": {}, "metrics": {}}
            person = people.get(row["id"].rpartition("/")[0])
            made |= {k: "" if person is None else getattr(person, k) for k in ("emotion", "problem", "situation")}
            self._made[key] = made
        return self._made[key]

    def _numbers(self, chat: Sequence[Mapping[str, str]]) -> list[int]:
        return [self.messages.setdefault((m["role"], m["content"]), len(self.messages)) for m in chat]

    def _round(self, folder: Path, prefix: str, people: People) -> None:
        rows = {kind: _rows(folder / f"{kind}.jsonl") for kind in KINDS}
        if not rows["drafts"]:  # DPO on pairs from elsewhere
            return
        outcome = {str(r["id"]): str(r["reason"]) for r in _rows(folder / "dropped.jsonl")}
        # A file may hold pairs of earlier rounds as well, and several drafts and refinements of a context; of those the ones
        # that became its pair are shown, or the first.
        pairs = {str(r["id"]): r for r in _rows(folder / "pairs.jsonl") if f"round{r['round']}" == folder.name}
        outcome |= dict.fromkeys(pairs, KEPT)
        first = {kind: [r for r in rows[kind] if r.get("sample", 0) == 0] for kind in KINDS}
        others = {kind: {r["id"]: r for r in first[kind]} for kind in KINDS[1:]}
        taken = {side: {n: p[side][0]["content"] for n, p in pairs.items()} for side in ("chosen", "rejected")}
        several = {kind for kind in KINDS if len(first[kind]) < len(rows[kind])}
        for draft in first["drafts"]:
            name = draft["id"]
            made = {"round": prefix + folder.name, "draft": draft["text"], "outcome": outcome.get(name, "")}
            if "drafts" in several:
                made["draft"] = taken["rejected"].get(name, draft["text"])
            if (reflection := others["reflections"].get(name)) is not None:
                made["reflection"] = reflection["reflection"]
            if (refinement := others["refinements"].get(name)) is not None:
                made["refinement"] = refinement["text"]
                if "refinements" in several:
                    made["refinement"] = taken["chosen"].get(name, refinement["text"])
            self._example("train", draft, draft["prompt"], people)["rounds"].append(made)
