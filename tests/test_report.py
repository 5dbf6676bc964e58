"""The report: what it reads of a run, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import Refused
from report_runs import made_run, write_rows

import esjax
from esjax.cli import main
from esjax.eval.results import Value, write_parquet
from esjax.report.gather import gather
from esjax.report.live import HOST, app
from esjax.report.page import content, html, named
from esjax.run.jsonl import read_jsonl
from esjax.run.listen import listen
from esjax.settings.files import changed
from esjax.settings.schema import Config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> שלום \u2028 end"
)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_every_example_of_a_real_run_is_there(tiny_run: Path) -> None:
    page = content(named([str(tiny_run)]))
    by_id = {e["id"]: e for e in page["examples"]}
    for t in (1, 2):
        folder = tiny_run / f"round{t}"
        kept = {r["id"] for r in read_jsonl(folder / "pairs.jsonl")}
        reasons = {r["id"]: r["reason"] for r in read_jsonl(folder / "dropped.jsonl")}
        refined = {r["id"]: r["text"] for r in read_jsonl(folder / "refinements.jsonl")}
        for draft in read_jsonl(folder / "drafts.jsonl"):
            (made,) = [r for r in by_id[draft["id"]]["rounds"] if r["round"] == f"round{t}"]
            assert made["draft"] == draft["text"]
            assert made["refinement"] == refined[draft["id"]]
            assert made["outcome"] == ("kept" if draft["id"] in kept else reasons[draft["id"]])
            chat = [page["messages"][number] for number in by_id[draft["id"]]["context"]]
            assert chat == [(m["role"], m["content"]) for m in draft["prompt"]]
    for model in ("backbone", "m0", "m1", "m2"):
        for row in read_jsonl(tiny_run / "eval" / f"{model}.jsonl"):
            assert by_id[row["id"]]["replies"][model] == row["prediction"]
            assert by_id[row["id"]]["metrics"][model]["words"] == len(row["prediction"].split())
    assert any(e["emotion"] for e in page["examples"])
    assert [f["id"] for f in page["figures"]] == [
        *("timeline", "curves-sft", "curves-round1-dpo", "curves-round2-dpo", "pairs", "metrics")
    ]
    (replies,) = [s for s in page["runs"][0]["stages"] if s["name"] == "round1/replies"]
    assert replies["facts"]["usage"]["replies"] == 48
    assert 0 < replies["facts"]["usage"]["lanes_busy"] <= 1


def test_evolve_ends_with_a_report(tiny_run: Path) -> None:
    text = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text.split('id="data"')[0])


def test_figures_hold_the_numbers_of_the_files(tiny_run: Path) -> None:
    figures = {f["id"]: f for f in content({"run": tiny_run})["figures"]}
    rows = read_jsonl(tiny_run / "round1" / "dpo" / "metrics.jsonl")
    loss, margin = (figures["curves-round1-dpo"]["plots"][i]["data"][0] for i in (0, 1))
    assert loss["x"] == [r["step"] for r in rows]
    assert (loss["y"], margin["y"]) == ([r["loss"] for r in rows], [r["margin"] for r in rows])
    records = json.loads((tiny_run / "eval" / "results.json").read_text())
    words = next(p for p in figures["metrics"]["plots"] if p["layout"]["title"]["text"] == "words a reply")
    for trace, model in zip(words["data"], ("backbone", "m0", "m1", "m2"), strict=True):
        (r,) = [r for r in records if (r["metric"], r["model"]) == ("words", model)]
        assert trace["x"] == [r["value"]]
        assert trace["error_x"]["array"][0] == pytest.approx(r["high"] - r["value"])
        assert trace["error_x"]["arrayminus"][0] == pytest.approx(r["value"] - r["low"])


def test_a_run_that_goes_on(tmp_path: Path, tiny_config: Config) -> None:
    run = made_run(tmp_path / "run", tiny_config)
    manifest = json.loads((run / "manifest.json").read_text())
    stages = {"sft": manifest["stages"]["sft"]}
    stages["round1/replies"] = {"status": "started", "inputs": {}, "makes": ["round1/drafts.jsonl"]}
    (run / "manifest.json").write_text(json.dumps({"stages": stages}))
    shutil.rmtree(run / "eval")
    shutil.rmtree(run / "round1")
    write_rows(run / "round1" / "drafts.jsonl.part", [{"index": 0}, {"index": 1}])
    with open(run / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # being written
    page = content({"run": run})
    assert "round1/replies is not finished (2 drafts so far)" in page["notes"][0]
    assert page["runs"][0]["curves"][0]["step"] == list(range(1, 9))
    assert page["examples"] == []
    assert [f["id"] for f in page["figures"]] == ["timeline", "curves-sft"]


def test_several_runs_beside_each_other(tmp_path: Path, tiny_config: Config) -> None:
    first = made_run(tmp_path / "first", tiny_config)
    second = made_run(tmp_path / "second", changed(tiny_config, {"dpo.beta": 0.2}))
    answers = second / "eval" / "m1.jsonl"
    write_rows(answers, [row | {"prediction": "I am glad"} for row in read_jsonl(answers)])
    page = gather({"first": first, "second": second})
    example = next(e for e in page["examples"] if e["replies"])
    assert sorted(example["replies"]) == sorted(
        f"{r}/{m}" for r in ("first", "second") for m in ("backbone", "m0", "m1")
    )
    assert example["replies"]["second/m1"] == "I am glad" != example["replies"]["first/m1"]
    tables = {t["title"]: t["rows"] for t in content({"first": first, "second": second})["tables"]}
    assert tables["Settings that differ"] == [["setting", "first", "second"], ["dpo.beta", "0.1", "0.2"]]
    moved = [next(c for c in r["curves"] if c["phase"] == "round1/dpo")["series"]["chosen_moved"] for r in page["runs"]]
    assert moved[0][0] == pytest.approx(1.0)  # reward 0.1 at beta 0.1
    assert moved[1][0] == pytest.approx(0.5)
    twins = made_run(tmp_path / "more" / "first", tiny_config)
    assert list(named([str(first), str(twins)])) == [str(first), str(twins)]


def test_a_corpus_that_is_gone_is_said(tmp_path: Path, tiny_config: Config) -> None:
    run = made_run(tmp_path / "run", changed(tiny_config, {"data.test": str(tmp_path / "gone.jsonl")}))
    page = content({"run": run})
    assert "gone.jsonl" in page["notes"][0]
    assert {e["emotion"] for e in page["examples"]} == {""}


def test_bad_input_of_report(tmp_path: Path, tiny_config: Config, refused: Refused) -> None:
    run = made_run(tmp_path / "run", tiny_config)
    assert "not a run directory" in refused("report", "--run-dir", tmp_path)
    assert "--port: only --live makes use of it" in refused("report", "--run-dir", run, "--port", 0)
    assert "--live writes no file" in refused("report", "--run-dir", run, "--live", "--out", tmp_path / "x")
    assert "given twice" in refused("report", "--run-dir", run, "--compare", run)
    assert "a folder; give a file" in refused("report", "--run-dir", run, "--out", tmp_path)
    assert "--config: a report reads the settings of its runs" in refused(
        "report", "--run-dir", run, "--config", "x.yaml"
    )
    assert "--seed: esjax report makes no use of it" in refused("report", "--run-dir", run, "--seed", 3)
    (run / "round1" / "drafts.jsonl").write_text("{")
    assert "drafts.jsonl" in refused("report", "--run-dir", run)
    assert not (run / "report.html").exists()


def test_a_taken_port_is_refused(tmp_path: Path, tiny_config: Config, refused: Refused) -> None:
    run = made_run(tmp_path / "run", tiny_config)
    held = listen(HOST, 0, 0)
    held.listen()
    port = held.getsockname()[1]
    assert f"--port {port} of 127.0.0.1: cannot be listened on" in refused(
        "report", "--run-dir", run, "--live", "--port", port
    )
    held.close()
    assert "--port 70000 of 127.0.0.1: cannot be listened on" in refused(
        "report", "--run-dir", run, "--live", "--port", 70000
    )


def test_the_live_page_answers_to_its_own_name_alone(tmp_path: Path, tiny_config: Config) -> None:
    from starlette.testclient import TestClient

    run = made_run(tmp_path / "run", tiny_config)
    client = TestClient(app({"run": run}), base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    data = client.get("/data").json()
    assert client.get("/data", params={"state": data["state"]}).status_code == 204
    (run / "round1" / "drafts.jsonl").write_text("{")
    assert client.get("/data", params={"state": data["state"]}).status_code == 503


def test_corpora_that_number_alike_are_told_apart(tmp_path: Path, tiny_config: Config) -> None:
    """Dialogue d0 that is trained on is another person's than dialogue d0 of the evaluation."""
    felt = {"train": "sad", "test": "afraid"}
    for split, emotion in felt.items():
        turns = [{"role": "seeker", "text": "I am tired, says number 0."}, {"role": "supporter", "text": "I see."}]
        row = {"id": "d0", "emotion": emotion, "turns": turns, "profile": "", "problem": "", "situation": ""}
        write_rows(tmp_path / f"{split}.jsonl", [row])
    given = {f"data.{split}": str(tmp_path / f"{split}.jsonl") for split in felt}
    run = made_run(tmp_path / "run", changed(tiny_config, {"data.format": "sample", **given}), count=1)
    for file in (run / "eval").glob("*.jsonl"):
        rows = read_jsonl(file)
        for row in rows if "." not in file.stem else ():
            row["id"] = "d0/1"
        write_rows(file, rows)
    write_parquet(run / "eval" / "results.parquet", [Value("m0", "words", "d0", "d0/1", -1, 3.0)])
    page = gather({"run": run})
    assert page["runs"][0]["unlabelled"] == ""
    answered, trained = page["examples"]
    assert (answered["id"], trained["id"]) == ("d0/1 (2)", "d0/1")
    assert (answered["emotion"], trained["emotion"]) == ("afraid", "sad")
    assert (len(answered["rounds"]), len(trained["rounds"])) == (0, 1)
    assert (set(answered["replies"]), set(trained["replies"])) == ({"backbone", "m0", "m1"}, set())
    assert (answered["metrics"], trained["metrics"]) == ({"m0": {"words": 3.0}}, {})


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Any, url: str, **how: Any) -> None:
        self.page = browser.new_context(**how).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.said.append(m.text))
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(url)
        self.page.wait_for_selector("body[data-drawn=yes]")

    @property
    def count(self) -> str:
        return str(self.page.inner_text("#count"))

    def follow(self, example: str, shown: str) -> None:
        """Follow a link to one example, until the page shows these words for it."""
        self.page.goto(f"{self.page.url.split('#')[0]}#example={example}")
        self.page.wait_for_selector(f"#example >> text={shown}")


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds. (Playwright's own wait for a condition is an `eval`, which the page forbids.)"""
    for _ in range(200):
        if holds():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def opened(browser: Any, tmp_path: Path, tiny_config: Config) -> Iterator[Opened]:
    """A hostile run's report, opened from its file."""
    run = made_run(tmp_path / "run", tiny_config, count=120, say=HOSTILE)
    main(["report", "--run-dir", str(run)])
    made = Opened(browser, f"file://{run}/report.html")
    yield made
    assert made.said == []
    assert [u for u in made.asked if not u.startswith(("file:", "data:", "blob:"))] == []
    assert made.page.title() == "run - esjax report"  # no dialogue's script ran
    made.page.context.close()


def test_every_figure_is_drawn(opened: Opened) -> None:
    drawn = opened.page.evaluate(
        "[...document.querySelectorAll('.plot')].map(n => n.querySelectorAll('.trace, .point path, .bars path').length)"
    )
    assert len(drawn) > 8
    assert all(drawn)
    names = opened.page.locator("#sections a").all_inner_texts()
    assert names == [
        *("Timeline", "Phase 1: SFT", "DPO, round 1", "Pairs kept and dropped", "Metrics", "Simulated conversations"),
        *("Differences between models", "Examples", "Simulated conversations, in full", "The run itself"),
    ]


def test_examples_are_filtered_found_and_linked(opened: Opened) -> None:
    page = opened.page
    assert opened.count == "240 of 240 examples"
    page.select_option("#by-outcome", "too_short")
    assert opened.count == "10 of 240 examples"
    page.click("text=Show all")
    page.wait_for_selector("#count >> text=240 of 240 examples")
    page.fill("#search", "NUMBER 117.")
    assert opened.count == "2 of 240 examples"
    page.fill("#search", "answers 117:")
    assert opened.count == "1 of 240 examples"
    page.fill("#search", "no such words")
    assert opened.count == "0 of 240 examples"
    page.fill("#search", "")
    page.select_option("#by-metric", "words")
    page.select_option("#by-model", "m1")
    page.select_option("#by-order", "down")
    assert opened.count == "120 of 240 examples"
    page.click("#list li:first-child a")
    page.wait_for_selector("#example h4")
    assert "words a reply: 31" in page.inner_text("#example") or page.locator("#example li", has_text="31").count()
    page.click("#after")
    assert page.inner_text("#page") == "51 to 100"
    opened.follow("d23%2F3", "Refined d23/3")  # a link that somebody sent
    assert page.inner_text("#example h3 >> nth=0") == "d23/3"
    opened.follow("nobody", "There is no example nobody")


def test_texts_are_shown_as_they_are(opened: Opened) -> None:
    page = opened.page
    opened.follow("td0%2F1", "td0/1")
    shown = page.inner_text("#example")
    assert HOSTILE.split(" \u2028")[0] in shown
    assert page.locator("#example img, #example script").count() == 0
    assert page.locator("#example [dir=auto]").count() > 4
    opened.follow("d0%2F3", "Refined d0/3")
    added, gone = (" ".join(page.locator(f"#example {tag}").all_inner_texts()) for tag in ("ins", "del"))
    assert "Refined" in added
    assert "Draft" in gone
    assert "שלום" not in added + gone  # what stayed is not marked


def test_theme_and_keyboard(opened: Opened) -> None:
    page = opened.page
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(({id, className}) => id || className)(document.activeElement)"))
    assert reached[0] == "skip"
    assert {"theme", "search", "by-emotion", "by-order"} <= set(reached)
    page.focus("#list li:nth-child(2) a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#list [aria-current]")
    assert page.inner_text("#example h3 >> nth=0") == page.inner_text("#list [aria-current]").split("\n")[0]
    back, font = "getComputedStyle(document.body).backgroundColor", "document.querySelector('.plot').layout.font.color"
    light, ink = page.evaluate(back), page.evaluate(font)
    page.click("#theme")
    assert page.evaluate(back) != light
    assert soon(lambda: page.evaluate(font) != ink)
    page.click("#theme")
    assert page.evaluate(back) == light


@pytest.mark.parametrize(
    "how", [{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}}]
)
def test_nothing_serious_bars_anybody(browser: Any, tmp_path: Path, tiny_config: Config, how: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    run = made_run(tmp_path / "run", tiny_config)
    main(["report", "--run-dir", str(run)])
    # axe puts itself into the page, which the page's own policy would forbid
    made = Opened(browser, f"file://{run}/report.html", bypass_csp=True, **how)
    assert made.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    made.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = Axe().run(made.page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
    made.page.context.close()


def test_the_live_page_follows_a_run(browser: Any, tmp_path: Path, tiny_config: Config) -> None:
    """A tiny job: phase 1 first, then the rest while the page is open."""
    run = tmp_path / "run"
    config = changed(tiny_config, {"evolve.rounds": 1})
    esjax.sft(config, run)
    listening = listen(HOST, 0, 0)
    server = uvicorn.Server(uvicorn.Config(app({"run": run}), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        made = Opened(browser, f"http://127.0.0.1:{listening.getsockname()[1]}/")
        page = made.page
        assert page.locator("#sections a").all_inner_texts() == ["Timeline", "Phase 1: SFT", "The run itself"]
        job = threading.Thread(target=esjax.evolve, args=(config, run))
        job.start()
        page.wait_for_selector("text=DPO, round 1", timeout=300_000)
        page.wait_for_selector("text=Differences between models >> visible=true", timeout=300_000)
        job.join()
        page.wait_for_selector("#notes", state="hidden", timeout=30_000)
        assert made.count.endswith(f"of {len(content({'run': run})['examples'])} examples")
        assert [t for t in made.said if "503" not in t] == []  # a file that was being replaced is asked for again
    finally:
        server.should_exit = True
        thread.join()


def test_many_examples(browser: Any, tmp_path: Path, tiny_config: Config) -> None:
    """What the page does with 10,000 stays right; how long it takes is measured by hand."""
    run = made_run(tmp_path / "run", tiny_config, count=5000)
    text = html({"run": run})
    (run / "report.html").write_text(text, encoding="utf-8")
    start = time.monotonic()
    made = Opened(browser, f"file://{run}/report.html")
    drawn = time.monotonic() - start
    took = made.page.evaluate(
        """() => { const s = document.getElementById('search'); const t = performance.now(); s.value = 'number 4321.';
                   s.dispatchEvent(new Event('input', {bubbles: true})); return performance.now() - t; }"""
    )
    print(f"opened in {drawn:.2f} s, filtered in {took:.0f} ms, {len(text) / 2**20:.1f} MiB")
    assert made.count == "2 of 10,000 examples"
    assert made.page.locator("#list li").count() == 2
    made.page.context.close()
