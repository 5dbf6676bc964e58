"""The conversation: in a pseudo-terminal, and as a page in a browser."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from conftest import Refused

from esjax.errors import InputError
from esjax.evolve.models import model_settings
from esjax.run.listen import listen
from esjax.safety.guard import Guard, read_resources
from esjax.serve.app import app
from esjax.serve.engine import Engine
from esjax.serve.server import Limits, Server
from esjax.serve.talk import SIGN, fitted, infer, open_also, reply_job, speak, why
from esjax.serve.web import routes
from esjax.settings.files import Overrides

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GIVEN = Overrides.of(None, {"reply.max_tokens": 24, "reply.batch": 2, "data.window": 256})
CRISIS = "I am going to kill myself tonight."


@pytest.fixture(scope="module")
def engine(tiny_run: Path) -> Iterator[Engine]:
    spec = f"{tiny_run}:m2"
    with Engine({"m2": (spec, model_settings(spec, GIVEN))}, most=16, thinks=True) as made:
        yield made


# --- what both do ----------------------------------------------------------------------------------------------------


def test_a_reply_grows_to_the_whole_one(engine: Engine) -> None:
    prompt = fitted(engine.models["m2"], [{"role": "user", "content": "I am tired."}]).prompt

    def drawn(seed: int) -> list[str]:
        return [reply.text for reply in speak(engine, reply_job(engine, "m2", prompt, seed))]

    seed = next(n for n in range(50) if len(drawn(n)) > 1)  # a reply that the host looks at more than once
    parts = drawn(seed)
    assert all(after.startswith(before) for before, after in pairwise(parts))
    assert drawn(seed)[-1] == parts[-1] != drawn(seed + 1)[-1]
    for reply in speak(engine, reply_job(engine, "m2", prompt, seed)):
        assert reply.finish is None
        break  # and is given up
    assert engine.waiting == 0


def test_the_oldest_turns_go_first(engine: Engine) -> None:
    opened = engine.models["m2"]
    chat: list[Any] = [
        {"role": ("user", "assistant")[i % 2], "content": f"This is number {i} of what was said."} for i in range(41)
    ]
    made = fitted(opened, chat)
    assert made.cut > 0
    assert made.cut % 2 == 0
    assert made.chat[0]["role"] == "system"
    assert made.chat[1:] == chat[made.cut :]
    assert len(made.prompt) <= opened.chat
    assert (
        len(opened.experiment.tokenizer.prompt([made.chat[0], *chat[made.cut - 2 :]])) > opened.chat
    )  # no more than needed
    with pytest.raises(InputError, match="too long"):
        fitted(opened, [{"role": "user", "content": "word " * 900}])


def test_what_stands_behind_a_reply(engine: Engine) -> None:
    chat: Any = [{"role": "user", "content": "My exam went badly."}]
    made = why(engine, "m2", chat, "Oh no.", 7)
    assert list(made.reflection) == ["profile", "emotional_state", "situation"]
    assert made.reflection == infer(engine, "m2", chat, 7)
    assert made.reflection != infer(engine, "m2", chat, 8)
    assert made.draft == "Oh no."
    assert made.refinement


def test_another_model_of_the_run_is_opened_beside(engine: Engine) -> None:
    open_also(engine, "m0", GIVEN)
    assert engine.models["m0"].experiment.backbone is engine.models["m2"].experiment.backbone
    prompt = fitted(engine.models["m0"], [{"role": "user", "content": "I am tired."}]).prompt
    made = []
    for name in ("m0", "m2"):
        (*_, reply) = speak(engine, reply_job(engine, name, prompt, 3))
        made.append(reply.logprobs)
    assert made[0] != made[1]
    with pytest.raises(InputError, match="M_9 is not there"):
        open_also(engine, "m9", GIVEN)


# --- the terminal ----------------------------------------------------------------------------------------------------


class Shell:
    """A command in a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        environment = os.environ | {"COLUMNS": "100", "TERM": "dumb"}
        command = [sys.executable, "-m", "esjax", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment)
        os.close(slave)

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What was printed up to a pattern since the last time."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
                except OSError:
                    assert re.search(pattern, self.text), self.text
        out, self.text = self.text[: match.end()], self.text[match.end() :]
        return out

    def say(self, line: str) -> str:
        """Type a line, and what was printed until the next prompt."""
        os.write(self.master, f"{line}\n".encode())
        self.until(re.escape(line[:20]))
        return self.until("you> ")


def test_a_conversation_in_a_terminal(tiny_run: Path, tmp_path: Path) -> None:
    settings = [f"--{key}={value}" for key, value in GIVEN.single.items()]
    shell = Shell(tmp_path, "chat", "--model", f"{tiny_run}:m2", "--locale", "en-US", *settings)
    begin = shell.until("you> ")
    assert "It is no person and no therapist" in " ".join(begin.split())
    assert SIGN in begin
    assert "say something first" in shell.say("/why")
    reply = shell.say("I lost my job.")
    assert "m2> " in reply
    assert SIGN in reply  # stays in sight
    made = shell.say("/profile")
    assert all(f"{name}: They" in made for name in ("profile", "emotional state", "situation"))
    behind = shell.say("/why")
    assert "draft: " in behind
    assert "refined: " in behind
    sides = shell.say("/compare m0")
    assert "m2" in sides
    assert "m0" in sides
    assert "M_8 is not there" in shell.say("/compare m8")
    assert "no such command" in shell.say("/nothing")
    held = shell.say(CRISIS)
    assert "988" in held
    assert "?" in held
    for command in ("/why", "/profile", "/compare m0"):
        assert "the guard answered that message" in shell.say(command)
    assert "m2> " in shell.say("Thank you.")  # and the conversation goes on
    assert list(tmp_path.iterdir()) == []  # nothing is stored unless asked
    assert "6 messages written" in shell.say("/save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 3
    assert saved["messages"][0]["content"] == "I lost my job."
    assert saved["messages"][3]["content"] == read_resources()["en-US"]
    assert "exists; give a new file" in shell.say("/save talk.json")
    assert "a new conversation" in shell.say("/new")
    assert "say something first" in shell.say("/profile")
    os.write(shell.master, b"/quit\n")
    assert shell.process.wait(60) == 0


def test_bad_input_of_chat(tiny_run: Path, refused: Refused) -> None:
    model = f"{tiny_run}:m0"
    assert "--port: only --web makes use of it" in refused("chat", "--model", model, "--port", 0)
    assert "locale xx" in refused("chat", "--model", model, "--locale", "xx")
    assert "M_7 is not there" in refused("chat", "--model", f"{tiny_run}:m7")
    assert "makes no use of it" in refused("chat", "--model", model, "--dpo.beta", 1)
    small = ("--data.window", 32, "--reply.max_tokens", 24)
    assert "leaves 8 tokens for a conversation" in refused("chat", "--model", model, *small)


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    server = Server(engine, Guard("bundled:crisis", "de-DE"), Limits())
    listening = listen("127.0.0.1", 0, 0)
    running = uvicorn.Server(uvicorn.Config(app(server, *routes(server, GIVEN)), log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join()


def test_the_page_refuses_foreign_hosts_and_origins(url: str) -> None:
    body = json.dumps({"model": "m2", "messages": [{"role": "user", "content": "Hi."}], "seed": 1})
    for path in ("/chat/turn", "/chat/infer", "/chat/why", "/chat/open/m0"):
        assert httpx2.post(url + path, content=body, headers={"origin": "http://evil.example"}).status_code == 403
        assert httpx2.post(url + path, content=body, headers={"host": "evil.example"}).status_code == 400
    assert httpx2.get(url, headers={"host": "evil.example"}).status_code == 400
    assert httpx2.get(url).status_code == 200
    assert httpx2.post(f"{url}/chat/open/..%2F..", content=body).status_code in (400, 404)
    assert httpx2.post(f"{url}/chat/open/gs:", content=body).status_code == 400
    assert httpx2.post(f"{url}/chat/turn", content='{"model": "m2"}').status_code == 400
    long = json.dumps({"model": "m2", "messages": [{"role": "user", "content": "word " * 900}], "seed": 1})
    assert "too long" in httpx2.post(f"{url}/chat/turn", content=long).json()["error"]["message"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", [(1200, 800), (390, 844)])
def test_a_conversation_on_the_page(url: str, size: tuple[int, int]) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, bypass_csp=True)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.add_init_script(
            "crypto.getRandomValues = (array) => array.fill(7)"
        )  # one seed: replies are always the same
        page.goto(url)
        assert page.is_visible("#sign")
        assert SIGN in page.inner_text("#sign")
        text = "<b>I</b> lost my job & my dog."
        page.fill("#text", text)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "!document.getElementById('send').disabled && document.querySelectorAll('.said').length === 2"
        )
        assert page.inner_text(".user .text") == text
        assert page.inner_text(".assistant .text")
        page.click("#infer")
        page.wait_for_selector(".note >> text=emotional state: They feel")
        page.click("#why")
        page.wait_for_selector(".note >> text=refined: ")
        page.fill("#other", "m1")
        page.click("#compare")
        page.wait_for_selector(".sides .note:nth-child(2) .text:not(:empty)")
        page.wait_for_function("!document.getElementById('send').disabled")
        assert page.locator(".sides .who").all_inner_texts() == ["m2", "m1"]
        page.fill("#other", "m7")
        page.click("#compare")
        page.wait_for_selector("#status >> text=M_7 is not there")
        page.fill("#text", CRISIS)
        page.click("#send")
        page.wait_for_selector(".guard")
        assert read_resources()["de-DE"] in page.inner_text(".guard .text")
        page.wait_for_function("!document.getElementById('send').disabled")
        page.click("#why")
        page.wait_for_selector("#status >> text=the guard answered that message")
        page.fill("#text", "Thank you.")
        page.click("#send")
        page.wait_for_function(
            "!document.getElementById('send').disabled && document.querySelectorAll('.user').length === 3"
        )
        assert page.locator(".assistant").count() == 3  # the conversation went on
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        box = page.locator("#sign").bounding_box()
        assert box is not None
        assert box["y"] >= 0  # stays in sight
        found = Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        with page.expect_download() as saved:
            page.click("#save")
        messages = json.loads(Path(saved.value.path()).read_text())["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3
        assert messages[0]["content"] == text
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        page.click("#new")
        assert page.locator(".said").count() == 0
        assert all(u.startswith((url, "data:", "blob:")) for u in asked)
        assert [t for t in said if "400" not in t] == []  # the model that is not there
        browser.close()
