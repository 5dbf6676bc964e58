"""The launchers: what they would run exists as documented, and what they do when things go wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
WORK = ["evolve", "--config", "configs/llama3-8b.yaml", "--run-dir", "/mnt/runs/a b"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launchers need bash")

# The options of each command that the launchers use or name, as its documentation has them (and `--help` of gcloud 528 and docker
# 28, the parsers of xpk 1.16 and skypilot 0.14, the manual pages of Slurm 22.05); `=` marks an option with a value, `[=]` one
# whose value can be left out.
GCLOUD = "--zone= --project= --quiet"
DOCUMENTED: dict[str, str] = {
    # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
    "gcloud compute tpus queued-resources create": f"""--runtime-version= --accelerator-type= --node-id= --node-count=
        --node-prefix= --guaranteed --network= --reserved --spot {GCLOUD}""",
    "gcloud compute tpus queued-resources delete": f"--force {GCLOUD}",
    "gcloud compute tpus queued-resources list": f"--filter= --format= {GCLOUD}",
    # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
    "gcloud compute tpus tpu-vm ssh": f"--plain --worker= --command= {GCLOUD}",
    "gcloud compute tpus tpu-vm scp": f"--worker= --recurse {GCLOUD}",
    # https://git-scm.com/docs/git and https://git-scm.com/docs/git-archive
    "git": "-C= --format= --prefix= --output=",
    "mkdir": "-p",
    # https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md, src/xpk/parser/workload.py
    "xpk workload create": """--project= --zone= --workload= --cluster= --command= --tpu-type= --num-slices= --storage=
        --restart-on-exit-codes= --priority= --max-restarts= --termination-grace-period-seconds= --env= --docker-image=""",
    "xpk workload delete": "--project= --zone= --cluster= --workload= --force",
    # https://slurm.schedmd.com/sbatch.html, srun.html and scontrol.html
    "sbatch": """--account= --cpus-per-task= --gpus-per-node= --job-name= --nodes= --ntasks-per-node= --open-mode= --output=
        --partition= --requeue --signal= --time=""",
    "srun": "--cpus-per-task= --gpu-bind= --kill-on-bad-exit[=] --label --wait=",
    "scontrol requeue": "",
    # https://docs.skypilot.co/en/latest/reference/cli.html#sky-jobs-launch
    "sky jobs launch": """--name= --workdir= --infra= --num-nodes= --use-spot --no-use-spot --env= --secret= --gpus=
        --detach-run --yes""",
    # https://docs.docker.com/reference/cli/docker/buildx/build/
    "docker build": "--build-arg= --file= --platform= --tag=",
    "env": "",
}
RUNS_ANOTHER = ("srun", "env")  # what follows their options is another command


def faults(command: list[str]) -> list[str]:
    """What the documentation of a command does not have: its name, options, and values missing or too many."""
    name = next((n for n in DOCUMENTED if command[: len(n.split())] == n.split()), None)
    if name is None:
        return [f"unknown command {shlex.join(command)}"]
    options = DOCUMENTED[name].split()
    found, rest = [], command[len(name.split()) :]
    while rest:
        option, equals, _ = rest.pop(0).partition("=")
        if not option.startswith("-"):
            if name in RUNS_ANOTHER and not equals:
                break
        elif f"{option}[=]" in options:
            pass
        elif f"{option}=" in options:
            if not equals and (not rest or rest.pop(0).startswith("--")):
                found.append(f"{name} {option} lacks its value")
        elif option not in options:
            found.append(f"{name} has no {option}")
        elif equals:
            found.append(f"{name} {option} takes no value")
    return found


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    given = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=given, stdin=subprocess.DEVNULL)


def printed(script: str, *arguments: object, **environment: str) -> list[list[str]]:
    """The commands that a dry run prints, all of them as documented."""
    done = run(script, "--dry-run", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert commands
    assert [f for command in commands for f in faults(command)] == []
    return commands


def value(command: list[str], option: str) -> str:
    [found] = [word.removeprefix(f"{option}=") for word in command if word.startswith(f"{option}=")]
    return found


TPU = ["--name=n", "--zone=z", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
XPK = ["--workload=w", "--cluster=c", "--tpu-type=v5litepod-16", "--docker-image=registry/image:1"]


def test_tpu_vm() -> None:
    commands = printed("tpu_vm.sh", *TPU, "--spot", "--delete", "--create-flag=--network=mine", "--", *WORK)
    verbs = [" ".join(c[3:5]) if c[0] == "gcloud" else c[0] for c in commands]
    assert verbs == [
        *("mkdir", "git", "queued-resources list", "queued-resources create", "queued-resources list"),
        *("tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm scp", "queued-resources delete"),
    ]
    create, install, work = commands[3], commands[6], commands[7]
    assert "--spot" in create
    assert value(create, "--node-id") == "n"
    assert value(create, "--network") == "mine"
    assert "esjax[tpu]" in value(install, "--command")
    assert value(work, "--worker") == "all"
    ran = shlex.split(value(work, "--command"))
    at = ran.index("../esjax-venv/bin/esjax")
    assert ran[at + 1 : at + 7] == [*WORK, "--distributed"]  # quoted once for gcloud, once for the worker's shell


def test_tpu_vm_slices() -> None:
    commands = printed("tpu_vm.sh", *TPU, "--project", "p", "--node-count", "2", "--", *WORK)
    [create] = [c for c in commands if "create" in c]
    assert value(create, "--node-count") == "2"
    work = [c for c in commands if "ssh" in c and "flock" in value(c, "--command")]
    assert [c[5] for c in work] == ["n-0", "n-1"]
    assert all("--project=p" in c for c in commands if c[0] == "gcloud")
    assert not any("delete" in c for c in commands)


def test_gke_xpk() -> None:
    [create] = printed("gke_xpk.sh", *XPK, "--storage", "s", "--env", "A=1", "--num-slices", "2", "--", *WORK)
    assert shlex.split(value(create, "--command")) == ["exec", "esjax", *WORK, "--distributed"]
    assert value(create, "--restart-on-exit-codes") == "1,75"
    assert value(create, "--env") == "A=1"
    [delete] = printed("gke_xpk.sh", *XPK[:2], "--delete")
    assert delete[:3] == ["xpk", "workload", "delete"]


def test_slurm() -> None:
    [command] = printed("slurm.sbatch", "--", *WORK, ESJAX="python -m esjax", SLURM_CPUS_PER_TASK="5")
    assert command[-9:] == ["python", "-m", "esjax", *WORK, "--distributed"]
    assert value(command, "--cpus-per-task") == "5"
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH {d}" for d in directives]  # sbatch stops at the first command
    assert faults(["sbatch", *directives]) == []
    settings = dict(d.lstrip("-").partition("=")[::2] for d in directives)
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert {"signal", "requeue"} < set(settings)


def test_skypilot() -> None:
    given = [
        "--gpus",
        "tpu-v6e-16",
        "--num-nodes=1",
        "--extra=tpu",
        "--nfs=h:/x",
        "--name",
        "n",
        "--no-use-spot",
        "--yes",
    ]
    [command] = printed("skypilot.sh", *given, "--", *WORK)
    values = dict(command[i + 1].split("=", 1) for i, word in enumerate(command) if word == "--env")
    assert shlex.split(values["ESJAX_ARGS"]) == WORK
    assert (values["EXTRA"], values["NFS_EXPORT"]) == ("tpu", "h:/x")
    assert Path(command[-1]) == LAUNCH / "skypilot.yaml"
    assert {"--name", "n", "--no-use-spot", "--yes", "--num-nodes"} < set(command)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_build(kind: str) -> None:
    [command] = printed("build.sh", kind, "registry/image:1", "--base", "mirror/python:3.11", "--user=root")
    assert Path(command[command.index("--file") + 1]) == LAUNCH / f"Dockerfile.{kind}"
    assert command[command.index("--tag") + 1] == "registry/image:1"
    assert {"BASE=mirror/python:3.11", "RUN_AS=root"} < set(command)
    assert Path(command[-1]) == ROOT


def test_local() -> None:
    commands = printed("local_multiprocess.sh", "--processes=3", "--port", "1234", "--", *WORK, XLA_FLAGS="--xla_a=b")
    flags = "XLA_FLAGS=--xla_a=b --xla_force_host_platform_device_count=4"
    start = ["env", "JAX_PLATFORMS=cpu", flags, "esjax", *WORK, "--coordinator", "127.0.0.1:1234"]
    assert commands == [[*start, "--num-processes", "3", "--process-id", str(i)] for i in range(3)]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (
            "gcloud compute tpus tpu-vm ssh n --worker=all --everywhere",
            "gcloud compute tpus tpu-vm ssh has no --everywhere",
        ),
        ("gcloud compute tpus tpu-vm ssh n --worker", "gcloud compute tpus tpu-vm ssh --worker lacks its value"),
        ("gcloud compute tpus tpu-vm ssh n --plain=1", "gcloud compute tpus tpu-vm ssh --plain takes no value"),
        ("gcloud compute tpus start", "unknown command gcloud compute tpus start"),
        ("srun --retries=3 esjax --run-dir x", "srun has no --retries"),
        ("sky jobs launch --env --yes x", "sky jobs launch --env lacks its value"),
    ],
)
def test_undocumented(command: str, fault: str) -> None:
    assert faults(command.split()) == [fault]


REFUSED = f"""
tpu_vm.sh {" ".join(TPU)} --sopt -- evolve: unknown option --sopt
tpu_vm.sh {" ".join(TPU[1:])} -- evolve: --name is missing
tpu_vm.sh {" ".join(TPU)} --project: --project needs a value
tpu_vm.sh {" ".join(TPU)} --project --spot -- evolve: --project needs a value
tpu_vm.sh {" ".join(TPU)} --retries many -- evolve: --retries needs a number, not many
tpu_vm.sh {" ".join(TPU)} --node-count=0 -- evolve: --node-count needs at least 1
tpu_vm.sh {" ".join(TPU)}: the esjax command is missing
gke_xpk.sh --tpus=3 -- evolve: unknown option --tpus
gke_xpk.sh --workload=w --cluster=c --tpu-type=t -- evolve: --docker-image is missing
gke_xpk.sh --storage=: --storage needs a value
gke_xpk.sh --workload=w --cluster=c --tpu-type=t --docker-image=i: the esjax command is missing
slurm.sbatch --nodes=4 -- evolve: unknown option --nodes=4
slurm.sbatch: the esjax command is missing
skypilot.sh --dryrun -- evolve: unknown option --dryrun
skypilot.sh --extra rocm -- evolve: --extra is cuda or tpu, not rocm
skypilot.sh --gpus: --gpus needs a value
skypilot.sh --yes: the esjax command is missing
local_multiprocess.sh --procs 2 -- evolve: unknown option --procs
local_multiprocess.sh --processes two -- evolve: --processes needs a number
local_multiprocess.sh --processes=0 -- evolve: need at least 1
local_multiprocess.sh --log-dir -- evolve: --log-dir needs a value
local_multiprocess.sh --processes 2: the esjax command is missing
build.sh gpu: needs gpu or tpu, and the image's name
build.sh cpu image: builds gpu or tpu, not cpu
build.sh --push gpu image: unknown option --push
build.sh gpu image --base: --base needs a value
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_options(line: str) -> None:
    command, says = line.split(": ", 1)
    script, *arguments = command.split()
    done = run(script, "--dry-run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in text
    assert max(map(len, text.splitlines())) <= 120
    shown = run(script.name, "--help")
    assert shown.returncode == 0
    assert "Prerequisites" in shown.stdout
    assert "set -" not in shown.stdout
    assert f"`{script.name}`" in (LAUNCH / "README.md").read_text()


def shellcheck(*arguments: object, text: str | None = None) -> None:
    tool = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert tool is not None, "the `test` extra brings shellcheck"
    done = subprocess.run([tool, *map(str, arguments)], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck() -> None:
    shellcheck(*SCRIPTS)
    for section in ("setup", "run"):
        shellcheck("--shell=bash", "-", text=skypilot()[section])


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_keys() -> None:
    task = skypilot()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert task["envs"]["ESJAX_ARGS"] is None  # so that sky refuses a launch without it
    assert all(v is None or isinstance(v, str) for v in task["envs"].values())
    given = set(re.findall(r"\$\{?(SKYPILOT_\w+)", task["run"]))
    # https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html
    assert given == {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}


@pytest.mark.parametrize(
    ("codes", "times"), [((0,), 1), ((2,), 1), ((143,), 1), ((1,), 4), ((137,), 4), ((75, 75, 75, 75, 75, 0), 6)]
)
@pytest.mark.parametrize("extra", ["cuda", "tpu"])
def test_skypilot_run(extra: str, codes: tuple[int, ...], times: int, tmp_path: Path) -> None:
    """The last code is that of all further calls."""
    esjax, calls = tmp_path / "esjax-venv" / "bin" / "esjax", tmp_path / "calls"
    esjax.parent.mkdir(parents=True)
    turns = "".join(f"{i}) exit {code};; " for i, code in enumerate(codes, start=1))
    esjax.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{calls}"\ncase $(wc -l <"{calls}") in {turns}*) exit {codes[-1]};; esac\n'
    )
    esjax.chmod(0o755)
    given = {"HOME": str(tmp_path), "EXTRA": extra, "ESJAX_ARGS": shlex.join(WORK), "RETRY_SECONDS": "0"}
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    environment = {**os.environ, **given, **nodes}
    done = subprocess.run(["bash", "-c", skypilot()["run"]], env=environment, capture_output=True, text=True)
    assert done.returncode == codes[-1]
    where = "--coordinator 10.0.0.1:8476 --num-processes 2 --process-id 1" if extra == "cuda" else "--distributed"
    assert calls.read_text().splitlines() == [f"{' '.join(WORK)} {where}"] * times


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_dockerfile(kind: str) -> None:
    text = (LAUNCH / f"Dockerfile.{kind}").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert ["FROM", "${BASE}"] in steps
    assert steps[-2:] == [["USER", "${RUN_AS}"], ["ENTRYPOINT", '["esjax"]']]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [extra] = re.findall(r'pip install --no-cache-dir "\.\[(\w+)\]"', text)
    assert extra == {"gpu": "cuda", "tpu": "tpu"}[kind]
    assert extra in project["project"]["optional-dependencies"]
    copied = {word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]}
    assert copied == needed
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


class Tools:
    """Stand-ins for the tools, first on PATH: they note their arguments and answer as told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls.jsonl"
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        (folder / "bin").mkdir()
        for name in ("gcloud", "git", "srun", "scontrol", "xpk", "sky", "docker"):
            tool = folder / "bin" / name
            tool.write_text(
                f"#!{sys.executable}\n"
                "import json, pathlib, sys\n"
                f"folder, call = pathlib.Path({str(folder)!r}), [{name!r}, *sys.argv[1:]]\n"
                "with open(folder / 'calls.jsonl', 'a') as f: f.write(json.dumps(call) + '\\n')\n"
                "for answers in folder.glob('answers-*.json'):\n"
                "    left = json.loads(answers.read_text())\n"
                "    if any(answers.stem.removeprefix('answers-') in word for word in call) and left:\n"
                "        answers.write_text(json.dumps(left[1:]))\n"
                "        print(left[0][0], end='')\n"
                "        sys.exit(left[0][1])\n"
            )
            tool.chmod(0o755)

    def answer(self, word: str, *answers: tuple[str, int]) -> None:
        """To the calls with this word, one after another; then, and to all others: nothing, and success."""
        (self.folder / f"answers-{word}.json").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        calls = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        assert [f for call in calls for f in faults(call)] == []
        return calls

    def steps(self) -> list[str]:
        """What gcloud did, a word a call."""
        steps = []
        for call in self.calls():
            if call[0] == "gcloud":
                step = call[4]
                if step == "ssh":
                    step = "work" if "flock" in value(call, "--command") else "install"
                elif step == "scp":
                    step = "fetch" if "--recurse" in call else "send"
                steps.append(step)
        return steps

    def tpu_vm(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        logs = self.folder / "logs"
        return run("tpu_vm.sh", *TPU, "--poll=0", "--log-dir", logs, *arguments, "--", *WORK, **self.environment)


START = "send install work"


ACTIVE = ("ACTIVE", 0)
QUEUED = [(x, 0) for x in ("", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE")]
# How gcloud answers and with what codes the command ends; options; the exit code; what is done.
ASKED_TWICE = f"list create list list {START} list list delete list create list {START} fetch delete"
RESTARTED = f"list {START}{' list work' * 5} fetch"  # what is installed stays
COURSES: list[tuple[list[tuple[str, int]], list[int], str, int, str]] = [
    (QUEUED, [255, 0], "--spot --delete", 0, ASKED_TWICE),  # preempted
    ([ACTIVE] * 9, [1, 75, 134, 143, 75, 1], "--retries=2", 1, RESTARTED),
    ([ACTIVE], [2], "", 2, f"list {START} fetch"),  # bad input
    ([("FAILED", 0), ("", 1), ("FAILED", 0)], [], "--retries=2", 1, "list delete list list"),
]


@pytest.mark.parametrize(("states", "codes", "options", "code", "steps"), COURSES)
def test_tpu_vm_course(states: Any, codes: list[int], options: str, code: int, steps: str, tools: Tools) -> None:
    tools.answer("list", *states)
    tools.answer("flock", *(("", c) for c in codes))
    done = tools.tpu_vm(*options.split())
    assert (done.returncode, tools.steps()) == (code, steps.split())
    assert ("go on, and cost" in done.stderr) != ("--delete" in options)


def test_tpu_vm_refused(tools: Tools) -> None:
    tools.answer("create", ("", 1))
    assert tools.tpu_vm().returncode == 1
    assert tools.steps() == ["list", "create"]


def test_tpu_vm_slices_run(tools: Tools) -> None:
    tools.answer("list", ACTIVE)
    assert tools.tpu_vm("--node-count", "3").returncode == 0
    assert sorted(tools.steps()) == sorted(f"list {f'{START} fetch ' * 3}".split())


REQUEUES = [([0], 0, False), ([143], 0, True), ([143], 7, False), ([2], 0, False), ([75, 143], 0, True)]
REQUEUES += [([1, 137, 1, 1], 0, False), ([1, 75, 75, 1, 75, 75, 1, 0], 0, False)]


@pytest.mark.parametrize(("codes", "restarts", "requeued"), REQUEUES)
def test_slurm_requeue(codes: list[int], restarts: int, requeued: bool, tools: Tools) -> None:
    tools.answer("evolve", *(("", code) for code in codes))
    job = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts), "MAX_REQUEUES": "7", "RETRY_SECONDS": "0"}
    assert run("slurm.sbatch", "--", *WORK, **tools.environment, **job).returncode == codes[-1]
    calls = tools.calls()
    assert [call[0] for call in calls[: len(codes)]] == ["srun"] * len(codes)
    assert calls[len(codes) :] == ([["scontrol", "requeue", "Incomplete", "42"]] if requeued else [])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("gke_xpk.sh", [*XPK, "--", *WORK]), ("skypilot.sh", ["--", *WORK]), ("build.sh", ["gpu", "image"])],
)
def test_runs_what_it_prints(script: str, arguments: list[str], tools: Tools) -> None:
    tools.answer("", ("", 7))
    assert run(script, *arguments, **tools.environment).returncode == 7
    assert tools.calls() == printed(script, *arguments)


class Local:
    """local_multiprocess.sh with a stand-in for esjax that does what `plan` says: at start i, what process j does.

    A number is an exit code, given once all processes have started; `wait` ends with 143 at SIGTERM, `stay` ignores it.
    """

    def __init__(self, folder: Path) -> None:
        self.starts, self.logs = folder / "starts", folder / "logs"
        self.starts.mkdir()
        self.esjax = folder / "esjax.py"
        self.esjax.write_text(
            "import json, os, pathlib, signal, sys, time\n"
            f"folder = pathlib.Path({str(self.starts)!r})\n"
            "me, total = int(sys.argv[-1]), int(sys.argv[-3])\n"
            "attempt = len(list(folder.glob(f'*-{me}.json')))\n"
            "does = json.loads(os.environ['PLAN'])[attempt][me]\n"
            "def end(*_):\n"
            "    (folder / f'{attempt}-{me}.ended').touch()\n"
            "    print('saved', file=sys.stderr)\n"
            "    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, end if does == 'wait' else signal.SIG_IGN if does == 'stay' else signal.SIG_DFL)\n"
            "kept = {k: os.environ.get(k) for k in ('JAX_PLATFORMS', 'XLA_FLAGS')}\n"
            "note = folder / f'{attempt}-{me}.json'\n"
            "note.with_suffix('.part').write_text(json.dumps({'arguments': sys.argv[1:], **kept}))\n"
            "note.with_suffix('.part').rename(note)\n"
            "print(f'out of {me}', flush=True)\n"
            "print(f'err of {me}', file=sys.stderr, flush=True)\n"
            "while len(list(folder.glob(f'{attempt}-*.json'))) < total: time.sleep(0.01)\n"
            "if isinstance(does, int): sys.exit(does)\n"
            "while True: time.sleep(0.01)\n"
        )

    def start(self, plan: list[list[int | str]], *options: object) -> subprocess.Popen[str]:
        script = ["bash", LAUNCH / "local_multiprocess.sh", "--processes", len(plan[0]), "--log-dir", self.logs]
        command = [str(x) for x in [*script, *options, "--", *WORK]]
        given = {"ESJAX": f"{sys.executable} {self.esjax}", "PLAN": json.dumps(plan), "XLA_FLAGS": "--a=b"}
        environment = {"RETRY_SECONDS": "0", **os.environ, **given}
        pipe = subprocess.PIPE
        # A job in the background of a plain shell ignores SIGINT, and bash traps nothing that it was told to ignore.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, plan: list[list[int | str]], *options: object) -> tuple[int, str, str]:
        launcher = self.start(plan, *options)
        out, err = launcher.communicate(timeout=60)
        return launcher.returncode, out, err

    def names(self, ending: str) -> list[str]:
        """ATTEMPT-PROCESS of those that started (`json`) or were told to end (`ended`)."""
        return sorted(path.stem for path in self.starts.glob(f"*.{ending}"))


@pytest.fixture
def local(tmp_path: Path) -> Local:
    return Local(tmp_path)


def test_local_run(local: Local) -> None:
    code, out, err = local.run([[0, 0, 0]], "--devices=2")
    assert (code, out, err) == (0, "out of 0\n", "err of 0\n")
    assert local.names("json") == ["0-0", "0-1", "0-2"]
    ports = set()
    for i in range(3):
        note = json.loads((local.starts / f"0-{i}.json").read_text())
        assert note["JAX_PLATFORMS"] == "cpu"
        assert note["XLA_FLAGS"] == "--a=b --xla_force_host_platform_device_count=2"
        coordinator, host, *rest = note["arguments"][len(WORK) :]
        assert note["arguments"][: len(WORK)] == WORK
        assert (coordinator, rest) == ("--coordinator", ["--num-processes", "3", "--process-id", str(i)])
        ports.add(host)
        log = (local.logs / f"process-{i}.log").read_text()
        assert log.count(f"out of {i}") == log.count(f"err of {i}") == 1
    [port] = ports
    assert re.fullmatch(r"127\.0\.0\.1:\d+", port)


def test_local_again(local: Local) -> None:
    code, _, err = local.run([["wait", 3, "wait"], [0, 0, 0]])
    assert code == 0
    assert local.names("json") == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert local.names("ended") == ["0-0", "0-2"]
    assert "process 1 ended with exit code 3" in err
    assert "saved" in err  # process 0's output while it ends
    assert (local.logs / "process-1.log").read_text().count("out of 1") == 2


@pytest.mark.parametrize(
    ("plan", "options", "code", "starts"),
    [
        ([["wait", 3]] * 3, ["--retries=2"], 3, 6),  # it gives up
        ([[2, 2]], [], 2, 2),  # bad input
        ([["wait", 2]], [], 2, 2),
        ([[75, "wait"], [143, "wait"], [1, "wait"], [75, 75], [143, 143], [0, 0]], ["--retries=1"], 0, 12),
        ([["stay", 1]], ["--retries=0", "--grace=1"], 1, 2),
    ],
)
def test_local_course(plan: Any, options: list[str], code: int, starts: int, local: Local) -> None:
    ended, _, err = local.run(plan, *options)
    assert (ended, len(local.names("json"))) == (code, starts)
    assert ("this may pass" in err and "(1 of 1)" in err) == (starts == 12)  # what passes is not counted


def test_local_signal_in_a_pause(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRY_SECONDS", "100")
    launcher = local.start([[75, 75]])
    assert launcher.stderr is not None
    while "in 100 s" not in (line := launcher.stderr.readline()):
        assert line
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=30)
    assert (launcher.returncode, local.names("json")) == (143, ["0-0", "0-1"])


def test_pauses_double(tools: Tools, tmp_path: Path) -> None:
    """Up to ten minutes, in every launcher that makes some."""
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text(f'#!/bin/sh\necho "$1" >>"{tmp_path}/slept"\n')
    sleep.chmod(0o755)
    tools.answer("evolve", *[("", 75)] * 8)
    job = {"SLURM_JOB_ID": "42"}
    assert run("slurm.sbatch", "--", *WORK, **tools.environment, **job).returncode == 0
    assert (tmp_path / "slept").read_text().split() == ["10", "20", "40", "80", "160", "320", "600", "600"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_signal(sent: signal.Signals, local: Local) -> None:
    launcher = local.start([["wait", "wait", "wait"]])
    deadline = time.monotonic() + 30
    while len(local.names("json")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.send_signal(sent)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 143
    assert local.names("ended") == ["0-0", "0-1", "0-2"]
    assert "saved" in err
    assert len(local.names("json")) == 3  # and not once more
