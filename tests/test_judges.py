"""Judges: planted bias, kept answers, endpoints that fail, stall and talk nonsense, agreement with people."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused
from scipy.optimize import minimize
from test_eval import GENERIC, contexts

import esjax
from esjax.cli import main
from esjax.errors import InputError, TransientError
from esjax.eval.judges import endpoint
from esjax.eval.judges.ask import judged, length_controlled, prompts_folder
from esjax.eval.judges.check import agreement, kappa, read_ratings, squared, unweighted
from esjax.eval.judges.endpoint import Endpoint, chosen
from esjax.eval.judges.judge import Kept, Question
from esjax.eval.judges.open import check_judge, open_judge
from esjax.eval.judges.rules import Rule
from esjax.eval.replies import Reply
from esjax.eval.results import Value, summarise
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import Overrides
from esjax.settings.schema import JudgeSettings

FOLDER = prompts_folder("bundled:prompts/judge")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without any answers."""
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gold() -> list[Reply]:
    return contexts("bundled:data/sample/test.jsonl", 20)


def mean(values: list[Value], metric: str) -> float:
    return float(np.mean([v.value for v in values if v.metric == metric and v.without == -1]))


def asked(judge: Any, a: list[Reply], b: list[Reply]) -> list[Value]:
    return judged(judge, ["pairwise"], FOLDER, {"a": a, "b": b}, [("a", "b")])


# --- two replies, both orders ----------------------------------------------------------------------------------------


def test_a_judge_with_position_bias_is_exposed(gold: list[Reply]) -> None:
    generic = [replace(r, text=GENERIC) for r in gold]
    made = asked(Rule("first"), gold, generic)
    assert (mean(made, "judge_first"), mean(made, "judge_same")) == (1.0, 0.0)
    assert (mean(made, "judge_margin"), mean(made, "judge_wins")) == (0.0, 0.5)  # the orders cancel
    records = {r["metric"]: r for r in summarise(made, [], 400, 0).rows()}
    assert records["judge_margin"]["model"] == "a over b"
    assert records["judge_margin"]["differences"]["b"]["verdict"] == "no difference shown"
    fair = asked(Rule("overlap"), gold, generic)
    assert mean(fair, "judge_first") == 0.0
    assert mean(fair, "judge_same") == 1.0


def test_a_better_system_wins_and_a_against_a_ties(gold: list[Reply]) -> None:
    generic = [replace(r, text="Hm.") for r in gold]
    made = asked(Rule("overlap"), gold, generic)
    summary = summarise(made, [], 400, 0)
    assert summary.verdict(("judge_margin", "a over b", "b")) == "higher"
    assert mean(asked(Rule("overlap"), generic, gold), "judge_margin") == -mean(made, "judge_margin")
    same = asked(Rule("overlap"), gold, gold)
    wins = summarise(same, [], 400, 0).means["judge_wins"]["a over b"]
    assert wins.value == 0.5
    assert summarise(same, [], 400, 0).verdict(("judge_margin", "a over b", "b")) == "no difference shown"


def test_length_is_taken_out() -> None:
    """A judge that loves length alone, of replies that are mostly longer: no winner is left between replies of one length."""
    rng = np.random.default_rng(0)

    def drawn(low: int, high: int) -> list[Reply]:
        return [
            Reply(f"d{i}", f"d{i}/1", [{"role": "user", "content": f"{i}"}], "", " ".join(["word"] * int(n)))
            for i, n in enumerate(rng.integers(low, high, 300))
        ]

    made = asked(Rule("longer"), drawn(5, 40), drawn(3, 34))
    assert mean(made, "judge_wins") > 0.55
    assert abs(mean(made, "judge_wins_lc") - 0.5) < 0.05


def test_length_control_is_a_ridge_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.normal(8, 10, 200)
    wins = (rng.random(200) < 1 / (1 + np.exp(-0.7 - lengths / 10))).astype(float)
    x = np.tanh(lengths / lengths.std())

    def loss(w: np.ndarray) -> float:
        z = w[0] + w[1] * x
        return float((np.logaddexp(0, z) - wins * z).sum() + 0.5e-2 * (w**2).sum())

    expected = 1 / (1 + np.exp(-minimize(loss, np.zeros(2), tol=1e-12).x[0]))
    assert length_controlled(wins, lengths) == pytest.approx(expected, abs=1e-5)
    assert abs(length_controlled(wins, lengths) - wins.mean()) > 0.02
    assert 0.9 < length_controlled(np.ones(30), np.zeros(30)) < 1  # finite where all win


# --- a model as judge ------------------------------------------------------------------------------------------------


def test_every_verdict_of_a_local_judge_parses(tiny_folder: Path, gold: list[Reply]) -> None:
    """It is the model's own log-probs of the choices, and answers are asked for once."""
    judge = open_judge(JudgeSettings(source=f"model:{tiny_folder}"))
    few = gold[:4]
    generic = [replace(r, text=GENERIC) for r in few]
    values = judged(
        judge,
        ["pairwise", "rubrics", "faults", "discrepancy"],
        FOLDER,
        {"a": few, "b": [*generic[:-1], replace(few[-1], text="")]},
        [("a", "b")],
    )
    assert mean(values, "judge_malformed") == 0.0
    marks = [v.value for v in values if v.metric == "judge_empathy"]
    assert len(marks) == 8
    assert all(0 < m < 5 for m in marks)
    assert all(0 <= v.value <= 1 for v in values if v.metric in ("judge_discrepancy", "judge_unhelpful"))

    question = Question([{"role": "user", "content": "Which? Answer A, B or C."}], ("A", "B", "C"), ("x", "y"))
    (answer,) = Kept(judge).answers([question], "test")
    model = esjax.open_model(tiny_folder)
    scores = model.score([[*question.messages, {"role": "assistant", "content": c}] for c in question.choices])
    weights = np.exp([s.logprob for s in scores])
    assert answer.shares == pytest.approx(weights / weights.sum(), abs=1e-5)
    assert max(answer.shares or ()) - min(answer.shares or ()) > 1e-4


def test_a_model_does_not_judge_itself(tiny_run: Path, tiny_folder: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["eval", "--run-dir", tiny_run, "--out", tmp_path / "out", "--eval.judge.source", f"model:{tiny_folder}"]
    assert "is the backbone of what it judges" in refused(*command)
    assert not (tmp_path / "out" / "eval").exists()


def test_a_run_is_judged(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, settings = tmp_path / "out", ["--eval.judge.source", "rule:longer", "--eval.judge.asks", "pairwise,rubrics"]
    main(["eval", "--run-dir", str(tiny_run), "--out", str(out), *settings])
    said = capsys.readouterr().out
    assert "By the judge" in said
    assert "M_1 over M_0" in said
    rows = json.loads((out / "eval" / "results.json").read_text())
    assert {r["model"] for r in rows if r["metric"] == "judge_margin"} == {
        *("m0 over backbone", "m1 over m0", "m2 over m0", "m2 over m1")
    }
    (margin,) = (r["value"] for r in rows if (r["metric"], r["model"]) == ("judge_margin", "m1 over m0"))
    texts = [[r["prediction"] for r in read_jsonl(out / "eval" / f"{m}.jsonl")] for m in ("m1", "m0")]
    from esjax.corpus.text import words

    signs = [np.sign(len(words(a)) - len(words(b))) for a, b in zip(*texts, strict=True)]
    assert margin == pytest.approx(np.mean(signs))
    assert {r["model"] for r in rows if r["metric"] == "judge_empathy"} == {"backbone", "m0", "m1", "m2"}


# --- an endpoint -----------------------------------------------------------------------------------------------------

Behaviour = Callable[[int], tuple[int, Any, float]]  # the request's number -> status, body, seconds before it


class Server:
    """An OpenAI-compatible server on this machine, which behaves as a test says."""

    def __init__(self, behave: Behaviour) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                status, answer, seconds = behave(number)
                time.sleep(seconds)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Server]]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    made: list[Server] = []

    def start(behave: Behaviour) -> Server:
        made.append(Server(behave))
        return made[-1]

    yield start
    for server in made:
        server.http.shutdown()


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}


def ask(server: Server, **more: Any) -> Endpoint:
    return Endpoint(f"{server.url}#judge", JudgeSettings(source="x", **more))


def questions(count: int) -> list[Question]:
    return [Question([{"role": "user", "content": f"{i}"}], ("A", "B", "C"), (str(i), "a", "b")) for i in range(count)]


def test_answers_are_paid_for_once(serve: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_JUDGE_KEY", "secret")
    server = serve(lambda n: (200, says("B"), 0.0))
    kept = Kept(ask(server))
    first = kept.answers([*questions(6), questions(1)[0]], "test")
    assert [a.choice for a in first] == [1] * 7
    assert len(server.requests) == 6
    assert (kept.asked, kept.read, kept.written) == (6, 60, 12)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.requests[0] | {"messages": []} == {
        "model": "judge",
        "temperature": 0,
        "max_tokens": 512,
        "messages": [],
    }
    (file,) = (cache / "judges").glob("*.jsonl")
    with open(file, "a") as f:
        f.write('{"key": "half a li')  # a killed process
    assert file.read_text().count("\n") == 6
    again = Kept(ask(server))
    assert again.answers(questions(8), "test")[:6] == first[:6]
    assert len(server.requests) == 8  # two new ones
    assert len(Kept(ask(server)).known) == 8
    assert file.read_text().count("\n") == 9  # the torn line and two new ones
    assert Kept(Rule("first")).known == {}  # another judge's are its own


def test_failures_and_nonsense_are_asked_again(serve: Any) -> None:
    """Refused for now, broken, not JSON, without an answer, stalled: each once, and then an answer."""
    bad: list[tuple[int, Any, float]] = [
        *((429, {}, 0.0), (503, b"busy", 0.0), (200, b"<html>", 0.0), (200, {"choices": []}, 0.0)),
        (200, says("A"), 1.5),
    ]
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def behave(number: int) -> tuple[int, Any, float]:
        content = server.requests[number]["messages"][0]["content"]
        with lock:
            seen[content] = seen.get(content, 0) + 1
            return bad[int(content)] if seen[content] == 1 else (200, says("C"), 0.0)

    server = serve(behave)
    made = Kept(ask(server, timeout=0.5, at_once=3)).answers(questions(5), "test")
    assert [a.choice for a in made] == [2] * 5
    assert seen == dict.fromkeys("01234", 2)


@pytest.mark.parametrize(
    ("failing", "kind", "told"),
    [
        ((500, b"down", 0.0), TransientError, "no answer after 5 attempts"),
        ((200, b"nonsense", 0.0), TransientError, "no answer after 5 attempts"),
        ((200, says("A"), 30.0), TransientError, "Timeout"),
        ((401, {"error": "no such key"}, 0.0), InputError, "the judge refuses the question (401"),
    ],
)
def test_what_was_answered_before_a_failure_is_kept(
    failing: tuple[int, Any, float], kind: Any, told: str, serve: Any
) -> None:
    broken = True

    def behave(number: int) -> tuple[int, Any, float]:
        third = server.requests[number]["messages"][0]["content"] == "3"
        return failing if broken and third else (200, says("A"), 0.0)

    server = serve(behave)
    kept = Kept(ask(server, timeout=0.2, at_once=1))
    with pytest.raises(kind) as error:
        kept.answers(questions(6), "test")
    assert told in str(error.value)
    before = len(server.requests)
    broken = False
    again = Kept(ask(server, timeout=5.0))
    assert len(again.known) >= 3
    assert [a.choice for a in again.answers(questions(6), "test")] == [0] * 6
    assert len(server.requests) - before == 6 - len(again.known) + (6 - 3)  # none of the first three is asked again


def test_no_more_questions_than_the_limit_allows(serve: Any) -> None:
    server = serve(lambda n: (200, says("A"), 0.0))
    Kept(ask(server, per_minute=600, at_once=8)).answers(questions(6), "test")
    assert np.diff(sorted(server.times)).min() > 0.05


def test_a_killed_evaluation_asks_only_what_is_left(serve: Any, tmp_path: Path, gold: list[Reply], cache: Path) -> None:
    server = serve(lambda n: (200, says("A"), 0.05))
    files = []
    for name, replies in (("gold", gold), ("generic", [replace(r, text=GENERIC) for r in gold])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"id": r.context, "text": r.text}) + "\n" for r in replies))
    command = [sys.executable, "-m", "esjax", "eval", "--predictions", *map(str, files), "--out", str(tmp_path / "out")]
    command += ["--reference-data", "bundled:data/sample/test.jsonl", "--eval.judge.at_once", "2"]
    command += ["--eval.judge.source", f"endpoint:{server.url}#judge"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while len(server.requests) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = len(server.requests)
    assert 10 <= before < 2 * len(gold)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 2 * len(gold) <= len(server.requests) <= 2 * len(gold) + 3  # at most what was under way is asked twice
    assert f"{2 * len(gold)} answers in" in done.stderr


CHOSEN = [
    ("A", 0),
    ("b.", 1),
    ("**C**", 2),
    ("Reply A is warm, but reply B is about her job.\nVerdict: B", 1),
    ("The answer is C", 2),
    ("A\n\nReply A names the feeling.", 0),
    ("A good reply would ask more.", None),
    ("I cannot decide.", None),
    ("", None),
    ("Final answer: **A**", 0),
]


@pytest.mark.parametrize(("text", "number"), CHOSEN)
def test_what_words_choose(text: str, number: int | None) -> None:
    found = chosen(text, ("A", "B", "C"))
    assert (None if found is None else found.index(1.0)) == number


def test_marks_in_words() -> None:
    digits = tuple("012345")
    for text, mark in (("4", 4), ("4/5", 4), ("Rating: 3", 3), ("I would say 3 or 4", None), ("7", None)):
        found = chosen(text, digits)
        assert (None if found is None else found.index(1.0)) == mark, text


def test_malformed_answers_are_counted_and_left_out(serve: Any, gold: list[Reply]) -> None:
    server = serve(lambda n: (200, says("Well." if n % 2 else "A"), 0.0))
    made = asked(ask(server, at_once=1), gold[:6], [replace(r, text=GENERIC) for r in gold[:6]])
    assert mean(made, "judge_malformed") == 0.5
    assert mean(made, "judge_margin") == 1.0  # every first order was answered, with A
    assert [v for v in made if v.metric == "judge_same"] == []


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("rule:best", "no such rule; allowed: longer, overlap, first"),
        ("gpt-4", "expected endpoint:URL#MODEL"),
        ("endpoint:ftp://x#m", r"expected endpoint:http\(s\)://HOST/v1#MODEL"),
        ("endpoint:http://x/v1", r"expected endpoint:http\(s\)://HOST/v1#MODEL"),
        ("model:/nowhere", "does not exist"),
    ],
)
def test_no_such_judge(source: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_judge(JudgeSettings(source=source))


def test_a_missing_prompt_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairwise.txt").write_text("x")
    with pytest.raises(InputError, match=r"fluency\.txt is missing"):
        prompts_folder(str(tmp_path))


# --- agreement with people -------------------------------------------------------------------------------------------


def by_hand(a: list[int], b: list[int], size: int, square: bool) -> float:
    """Cohen's weighted kappa from its definition, rating by rating."""
    n = len(a)
    w = [[float((i - j) ** 2 if square else i != j) for j in range(size)] for i in range(size)]
    observed = sum(w[x][y] for x, y in zip(a, b, strict=True)) / n
    expected = sum(w[x][y] for x in a for y in b) / n**2
    return 1 - observed / expected


def test_kappa_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for size, weight, square in ((6, squared, True), (3, unweighted, False)):
        a = rng.integers(0, size, 60)
        b = np.where(rng.random(60) < 0.6, a, rng.integers(0, size, 60))
        table = np.zeros((size, size))
        np.add.at(table, (a, b), 1)
        assert kappa(table, weight(size)) == pytest.approx(by_hand(a.tolist(), b.tolist(), size, square))
    assert kappa(np.diag([3.0, 4, 5]), unweighted(3)) == 1.0
    assert np.isnan(kappa(np.diag([9.0, 0, 0]), unweighted(3)))


def test_judge_check(gold: list[Reply], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People who agree with a rule, by half, and not at all."""
    rule, rows, rng = Rule("longer"), [], np.random.default_rng(0)
    for i, r in enumerate(gold):
        short, long = "Short.", "This one is longer, by far."
        preferred = int(rng.integers(2)) if i % 2 else 1
        rows.append({"id": r.context, "messages": r.messages, "replies": [short, long], "preferred": preferred})
        rows.append({"id": r.context, "messages": r.messages, "reply": long, "rubric": "empathy", "rating": 5 - i % 2})
    file = tmp_path / "ratings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, empathy = agreement(rule, FOLDER, read_ratings(file), 300, 0)
    said = [row["preferred"] for row in rows if "preferred" in row]
    assert (pairs.what, pairs.rated, pairs.same, pairs.malformed) == ("pairs", len(gold), 1.0, 0.0)
    assert pairs.equal == pytest.approx(np.mean(said))
    assert pairs.kappa == pytest.approx(by_hand([1] * len(gold), said, 3, False), abs=1e-9)
    assert empathy.equal == 0.5
    assert np.isnan(empathy.same)
    first = agreement(Rule("first"), FOLDER, read_ratings(file), 300, 0)[0]
    assert (first.same, first.equal) == (0.0, 0.0)  # torn between the orders, it never decides
    main(["eval", "judge-check", str(file), "--eval.judge.source", "rule:longer"])
    out = capsys.readouterr().out
    assert "experts 0.58" in " ".join(out.split())
    assert "empathy" in out


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"reply": "x", "rubric": "empathy", "rating": 6}, "a whole number from 0 to 5"),
        ({"reply": "x", "rubric": "kindness", "rating": 3}, "one of fluency, empathy"),
        ({"reply": "x", "rubric": "empathy", "rating": True}, "a whole number"),
        ({"replies": ["x"], "preferred": 0}, '"preferred": 0, 1 or "tie"'),
        ({"replies": ["x", "y"], "preferred": 2}, '"preferred": 0, 1 or "tie"'),
    ],
)
def test_bad_ratings_are_named(row: dict[str, Any], told: str, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"id": "a/1", "messages": [{"role": "user", "content": "x"}]} | row) + "\n")
    line = refused("eval", "judge-check", file, "--eval.judge.source", "rule:first")
    assert "r.jsonl, line 1" in line
    assert told in line


def test_judge_check_alone(tmp_path: Path, refused: Refused) -> None:
    assert "--judge-check: expected one argument" in refused("eval", "judge-check")
    assert "--out: --judge-check makes no use of it" in refused(
        "eval", "judge-check", tmp_path / "r", "--out", tmp_path / "o"
    )
    (tmp_path / "r").write_text("")
    assert "--eval.candidates: judge-check makes no use of it" in refused(
        "eval", "judge-check", tmp_path / "r", "--eval.candidates", 3
    )
    assert "eval.judge.source is not set" in refused("eval", "judge-check", tmp_path / "r")
    assert "no rating" in refused("eval", "judge-check", tmp_path / "r", "--eval.judge.source", "rule:first")


def test_settings_of_a_judge_are_read(tmp_path: Path) -> None:
    config = Overrides.of(None, ["--eval.judge.asks", "pairwise,faults"]).load(together=False)
    assert config.eval.judge.asks == ("pairwise", "faults")
