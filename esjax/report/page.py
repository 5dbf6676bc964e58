"""The report's page: what was gathered, its figures and tables, and all scripts, in one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from esjax import __version__
from esjax.errors import InputError
from esjax.eval.metrics import ALL
from esjax.report.figures import differences, figures
from esjax.report.gather import gather, state
from esjax.run import buckets
from esjax.run.files import check_writable, publish_text, write_text
from esjax.run.jsonl import json_text
from esjax.run.progress import say
from esjax.runtime.context import current

Row = dict[str, Any]
REPORT = "report.html"
FOLDER = Path(__file__).parent / "page"


def named(runs: Sequence[str]) -> dict[str, Path]:
    """Run directories (folders, or URLs, of which a copy is made) by the names that the page calls them."""
    places = {run: buckets.copied(run) for run in runs}
    if len(places) < len(runs):
        raise InputError(f"{', '.join(runs)}: one run is given twice; leave it out once")
    last = [run.rstrip("/").rpartition("/")[2] for run in places]
    return dict(zip(last if len(set(last)) == len(last) else places, places.values(), strict=True))


def write(runs: Sequence[str], out: Path | None) -> Path:
    """Write the page of one or several runs; without ``out``, into the first one's directory. Raises InputError."""
    if out is not None:
        check_writable(out, "--out")
        if out.is_dir():
            raise InputError(f"{out}: a folder; give a file as --out")
    elif "://" in runs[0]:
        raise InputError(f"{runs[0]}: a report of a run behind a URL needs --out FILE")
    paths = named(runs)
    place = out or next(iter(paths.values())) / REPORT
    write_text(place, html(paths))
    return place


def publish(run: Path) -> None:
    """Write the page of a run that is finished into its directory, wherever that is."""
    bucket = buckets.of(run)
    place = bucket.url if bucket else str(run.resolve())
    publish_text(run / REPORT, html({place.rpartition("/")[2]: run}) if current().processes.writer else "")
    say(f"report: {place}/{REPORT}")


def content(runs: Mapping[str, Path]) -> Row:
    """All that the page's script draws. Raises InputError, see ``gather``."""
    made = state(runs.values())  # before the files are read: what changes meanwhile is read again
    page = gather(runs)
    page |= {"state": made, "figures": [f._asdict() for f in figures(page)], "differences": differences(page["runs"])}
    page |= {"tables": tables(page["runs"]), "labels": {name: m.label for name, m in ALL.items()}, "notes": notes(page)}
    return page


def html(runs: Mapping[str, Path], live: bool = False) -> str:
    """The whole page of one or several runs. ``live``: one that asks its server for what is new. Raises InputError."""
    return rendered(content(runs), ", ".join(runs), "A run", live)


def rendered(page: Row, name: str, what: str, live: bool = False) -> str:
    """The page of what ``content`` has, under a name; ``what`` it is of."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (FOLDER / "page.html").read_text(encoding="utf-8")
    )
    # Inside a script element nothing is escaped for us: "<" must not stand in the data, or a dialogue could close it.
    data = json_text(page, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    scripts = {"css": _own("page.css"), "js": _own("page.js"), "plotly": _plotly(), "data": data}
    trusted = {name: jinja2.utils.markupsafe.Markup(text) for name, text in scripts.items()}
    return template.render(name=name, what=what, version=__version__, live=live, **trusted)


@cache
def _plotly() -> str:
    text: str = get_plotlyjs()
    return text.replace("</script", "<\\/script")


def _own(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def notes(page: Row) -> list[str]:
    """What a reader should know first."""
    out = []
    for run in page["runs"]:
        going = [s for s in run["stages"] if s["status"] != "done"]
        if going:
            so_far = ", ".join(f"{n} {what}" for what, n in going[-1].get("so_far", {}).items())
            out.append(f"{run['name']}: {going[-1]['name']} is not finished{f' ({so_far} so far)' if so_far else ''}.")
        if run["unlabelled"]:
            out.append(
                f"{run['name']}: emotions and problems are not shown, as the corpus is not at hand ({run['unlabelled']})."
            )
    return out


def tables(runs: Sequence[Row]) -> list[Row]:
    """The tables of the page's last section."""
    names = [run["name"] for run in runs]
    keys = list(dict.fromkeys(key for run in runs for key in run["settings"]))
    settings = [[key, *(_text(run["settings"].get(key)) for run in runs)] for key in keys]
    different = [row for row in settings if len(set(row[1:])) > 1]
    made = []
    if different:
        made.append(_table("Settings that differ", [["setting", *names], *different]))
    made += [
        _table("Speed and memory", _speed(runs)),
        _table("Found by screening", _screened(runs)),
        _table("All settings", [["setting", *names], *settings], folded=True),
        _table("What each stage counted", _counted(runs), folded=True),
        _table("Versions, and hashes of the backbone's files", _versions(runs), folded=True),
    ]
    return [table for table in made if len(table["rows"]) > 1]


def _table(title: str, rows: list[list[str]], folded: bool = False) -> Row:
    return {"title": title, "rows": rows, "folded": folded}


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _speed(runs: Sequence[Row]) -> list[list[str]]:
    rows = [["stage", "seconds", "host memory so far (GiB)", "lanes busy", "drawn tokens/s", "prompt tokens computed"]]
    for run in runs:
        for s in run["stages"]:
            facts = s["facts"]
            used = facts.get("usage", {})
            busy, rate, shared = "", "", ""
            if used:
                busy, rate = f"{used['lanes_busy']:.0%}", f"{used['tokens'] / max(used['seconds'], 1e-9):,.0f}"
                shared = f"{used['computed_tokens']:,} of {used['prompt_tokens']:,}"
            memory = f"{facts['peak_gib']:.1f}" if "peak_gib" in facts else ""
            name = f"{run['name']}: {s['name']}" if len(runs) > 1 else s["name"]
            rows.append([name, "" if s["seconds"] is None else f"{s['seconds']:,.0f}", memory, busy, rate, shared])
    return rows


def _screened(runs: Sequence[Row]) -> list[list[str]]:
    rows = [["run", "split", "kind", "action", "turns"]]
    for run in runs:
        counts = Counter((f["source"], f["kind"], f["action"]) for f in run["screened"])
        rows += [[run["name"], *what, str(n)] for what, n in sorted(counts.items())]
    return rows


def _counted(runs: Sequence[Row]) -> list[list[str]]:
    rows = [["stage", "what", "value"]]
    for run in runs:
        for s in run["stages"]:
            rows += [[f"{run['name']}: {s['name']}", key, json_text(value)] for key, value in s["facts"].items()]
    return rows


def _versions(runs: Sequence[Row]) -> list[list[str]]:
    rows = [["of", "version or SHA-256"]]
    for run in runs:
        rows += [[f"{run['name']}: {name}", str(value)] for name, value in {**run["versions"], **run["base"]}.items()]
    return rows
