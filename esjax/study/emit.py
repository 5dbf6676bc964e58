"""A study as jobs for elsewhere: plain commands, a Slurm array, submitit, or managed jobs of SkyPilot.

Retries and queues are theirs. A run that is killed goes on when its command is given again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from esjax.errors import InputError
from esjax.run.files import check_new, write_text
from esjax.settings.files import dump, flat
from esjax.study.make import SHARED, run_folder
from esjax.study.spec import Cell, Study

NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
M0_SECTIONS = ("seed", "model", "train", "lora", "data", "screen", "sft", "prompts.system")  # what M_0 hangs on
TARGETS = ("shell", "slurm", "submitit", "skypilot")

SLURM = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output={logs}/%x-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# {count} runs of the study {study}, one a task of the array, on one GPU each; change the lines above as the cluster wants it.
set -euo pipefail
mapfile -t commands <<'COMMANDS'
{commands}
COMMANDS
bash -c "exec ${{commands[SLURM_ARRAY_TASK_ID]}}" &
pid=$!
trap 'kill -TERM $pid' TERM  # two minutes before the time limit; the run saves and ends with 143
code=0
wait $pid || code=$?
while kill -0 $pid 2>/dev/null; do wait $pid || code=$?; done
if ((code == 143 || code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi  # it goes on where it stopped
exit $code
"""
SUBMITIT = '''"""Submits the study {study} through submitit: python submit.py (pip install submitit)."""

import subprocess
import sys
from pathlib import Path

import submitit

HERE = Path(__file__).parent
FIRST, REST = ((HERE / name).read_text().splitlines() for name in ("first.txt", "rest.txt"))


class Run:
    """One run; after a time limit or a preemption it goes on where it stopped."""

    def __call__(self, command: str) -> None:
        subprocess.run(command, shell=True, check=True)

    def checkpoint(self, command: str) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, command)


def main(cluster: str | None) -> None:
    executor = submitit.AutoExecutor(folder={logs!r}, cluster=cluster)
    executor.update_parameters(name={name!r}, timeout_min=24 * 60, gpus_per_node=1, cpus_per_task=8, nodes=1)
    first = executor.map_array(Run(), FIRST)
    if not REST:
        return
    if executor.cluster == "slurm":  # the others take what these have made
        ids = ":".join(job.job_id.split("_")[0] for job in first[:1])
        executor.update_parameters(slurm_additional_parameters={{"dependency": f"afterok:{{ids}}"}})
    else:
        for job in first:
            job.result()
    executor.map_array(Run(), REST)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
'''


def emit(study: Study, target: str | None, out: Path | None, show: Callable[..., None]) -> None:
    """Write configs and jobs into a new folder, or print the plain commands where none is given. Raises InputError."""
    if target is None:
        target = "shell"
    if out is None and target != "shell":
        raise InputError(f"--for {target} writes files: give a new folder as --out")
    if out is not None and target == "skypilot" and not out.resolve().is_relative_to(Path.cwd()):
        raise InputError(
            f"--out {out}: SkyPilot brings the repository's folder alone; give a new folder in it, from its root"
        )
    folder = study.folder / "configs" if out is None else out / "configs"
    if out is not None:
        check_new(out, "folder")
    for cell in study.cells:
        write_text(folder / f"{cell.name}.yaml", f"# {study.name}: {cell.words}\n{dump(cell.config)}")
    first, rest = ([command(study, cell, folder) for cell in part] for part in leaders(study.cells))
    if out is None:
        show("\n".join([*first, *rest]), plain=True)
        return
    write_text(out / "first.txt", "".join(f"{line}\n" for line in first))
    write_text(out / "rest.txt", "".join(f"{line}\n" for line in rest))
    submit = {"shell": _shell, "slurm": _slurm, "submitit": _submitit, "skypilot": _skypilot}[target](
        study, out, first, rest
    )
    show(
        f"{len(first) + len(rest)} jobs, of which {len(first)} come first, as others share their M_0; submit them: {submit}",
        plain=True,
    )


def leaders(cells: list[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Of the cells with the same M_0 the first one, which makes it; and all others, which take it."""
    first: dict[str, Cell] = {}
    for cell in cells:
        settings = flat(cell.config.model_dump(mode="json"))
        shared = {k: v for k, v in settings if any(k == s or k.startswith(f"{s}.") for s in M0_SECTIONS)}
        first.setdefault(repr(sorted(shared.items())), cell)
    names = {cell.name for cell in first.values()}
    return list(first.values()), [cell for cell in cells if cell.name not in names]


def command(study: Study, cell: Cell, configs: Path) -> str:
    """The plain command of a run, with absolute paths."""
    places = {
        "--config": configs / f"{cell.name}.yaml",
        "--run-dir": run_folder(study, cell),
        "--shared": study.folder / SHARED,
    }
    return shlex.join(
        ["esjax", "evolve", *(word for option, p in places.items() for word in (option, str(p.absolute())))]
    )


def _slug(study: Study) -> str:
    """The study's name as a job's may be."""
    return NOT_IN_NAMES.sub("-", study.name.lower()).strip("-") or "study"


def _shell(study: Study, out: Path, first: list[str], rest: list[str]) -> str:
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", *first, *rest]
    write_text(out / "submit.sh", "\n".join(lines) + "\n")
    return f"bash {out / 'submit.sh'}"


def _slurm(study: Study, out: Path, first: list[str], rest: list[str]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "first=$(sbatch --parsable first.sbatch)",
    ]
    for name, commands in (("first", first), ("rest", rest)):
        text = SLURM.format(
            name=f"{_slug(study)}-{name}",
            study=study.name,
            last=len(commands) - 1,
            count=len(commands),
            logs=out.absolute(),
            commands="\n".join(commands),
        )
        if commands:
            write_text(out / f"{name}.sbatch", text)
    if rest:
        lines.append('sbatch --dependency="afterok:$first" rest.sbatch')
    write_text(out / "submit.sh", "\n".join(lines) + "\n")
    return f"bash {out / 'submit.sh'}"


def _submitit(study: Study, out: Path, first: list[str], rest: list[str]) -> str:
    text = SUBMITIT.format(study=study.name, name=_slug(study), logs=str(out.absolute() / "logs"))
    write_text(out / "submit.py", text)
    return f"python {out / 'submit.py'}"


def _skypilot(study: Study, out: Path, first: list[str], rest: list[str]) -> str:
    """By launch/skypilot.sh, which brings the repository's folder along, and so the configs, which lie in it."""
    lines = [
        "#!/usr/bin/env bash",
        "# From the repository's root; the study's folder must lie on storage that all jobs share (--nfs).",
    ]
    lines += [
        "set -euo pipefail",
        "[[ -f launch/skypilot.sh ]] || { echo 'run this from the root of the esjax repository' >&2; exit 2; }",
    ]
    for n, (cell, line) in enumerate(
        zip([c for part in leaders(study.cells) for c in part], [*first, *rest], strict=True)
    ):
        if n == len(first):
            lines.append(
                "# The jobs below take what those above have made: submit them when those are done (sky jobs queue)."
            )
        words = shlex.split(line)[1:]
        words[words.index("--config") + 1] = os.path.relpath(out / "configs" / f"{cell.name}.yaml")
        options = [
            "--name",
            f"{_slug(study)}-{cell.name}",
            "--gpus",
            "H100:1",
            "--num-nodes",
            "1",
            "--yes",
            "--detach-run",
        ]
        lines.append(shlex.join(["launch/skypilot.sh", *options]) + ' "$@" -- ' + shlex.join(words))
    write_text(out / "submit.sh", "\n".join(lines) + "\n")
    return f"bash {out / 'submit.sh'} --nfs HOST:/PATH"
