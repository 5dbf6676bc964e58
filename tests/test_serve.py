"""The server, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn
from conftest import Refused

from esjax.cli import main
from esjax.errors import InputError
from esjax.evolve.models import model_settings
from esjax.run.jsonl import read_jsonl
from esjax.run.listen import listen
from esjax.safety.guard import DEFAULT, Guard, Watch, read_resources
from esjax.sample.score import Tops, tops
from esjax.serve.app import app
from esjax.serve.engine import Engine, EngineFailed, names
from esjax.serve.protocol import ChatRequest, CompletionRequest, parsed
from esjax.serve.protocol import Refused as BadRequest
from esjax.serve.run import limits_of
from esjax.serve.server import Limits, Server
from esjax.settings.files import Overrides

SETTINGS = {"data.window": 512, "reply.max_tokens": 48, "reply.batch": 4}
GREEDY: dict[str, Any] = {"model": "two", "temperature": 0}
CHATS: list[list[Any]] = [
    [{"role": "user", "content": f"I am tired of {what}."}] for what in ("work", "my dog", "it all")
]


class Served:
    """A server in this process, and a client of it."""

    def __init__(self, models: dict[str, str], limits: Limits, most: int = 64) -> None:
        given = Overrides.of(None, SETTINGS)
        configs = {name: (spec, model_settings(spec, given)) for name, spec in models.items()}
        self.engine = Engine(configs, most)
        self.guard = Guard("bundled:crisis", "en-GB")
        self.limits = limits

    def __enter__(self) -> Served:
        self.engine.__enter__()
        listening = listen("127.0.0.1", 0, 0)
        self.port = listening.getsockname()[1]
        how = uvicorn.Config(app(Server(self.engine, self.guard, self.limits)), log_level="error", lifespan="off")
        self.server = uvicorn.Server(how)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.limits.key or "none", max_retries=0)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.__exit__()

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(f"{self.url}{path}", content=content, headers=headers, timeout=60)

    def idle(self) -> bool:
        """Whether nothing is being drawn any more, within a few seconds."""
        for _ in range(300):
            if not self.engine.waiting and not any(m.stream.busy for m in self.engine.models.values()):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def served(tiny_run: Path) -> Iterator[Served]:
    with Served({"two": f"{tiny_run}:m2", "zero": f"{tiny_run}:m0"}, Limits(body=1 << 16)) as made:
        yield made


# --- OpenAI's client -------------------------------------------------------------------------------------------------


def test_models_are_listed(served: Served) -> None:
    assert [m.id for m in served.client.models.list()] == ["two", "zero"]
    assert served.client.models.retrieve("zero").owned_by == "esjax"
    with pytest.raises(openai.NotFoundError, match="there is no model three; served are two, zero"):
        served.client.models.retrieve("three")


@pytest.mark.parametrize("name", ["two", "zero"])
def test_greedy_replies_are_those_of_sample(served: Served, tiny_run: Path, tmp_path: Path, name: str) -> None:
    rows = [{"id": str(i), "messages": chat} for i, chat in enumerate(CHATS)]
    (tmp_path / "in").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = f"{tiny_run}:{'m2' if name == 'two' else 'm0'}"
    more = [word for key, value in SETTINGS.items() if key != "data.window" for word in (f"--{key}", str(value))]
    files = ["--prompts", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    main(["sample", "--model", model, *files, "--reply.temperature", "0", *more])
    for chat, row in zip(CHATS, read_jsonl(tmp_path / "out"), strict=True):
        made = served.client.chat.completions.create(messages=chat, model=name, temperature=0, logprobs=True)
        (choice,) = made.choices
        assert choice.message.content == row["text"]
        assert choice.finish_reason == row["finish_reason"]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        drawn = [c.logprob for c in choice.logprobs.content]
        np.testing.assert_allclose(drawn, row["logprobs"], atol=1e-4)
        assert made.usage is not None
        assert made.usage.completion_tokens == len(row["token_ids"])
    other = {"two": "zero", "zero": "two"}[name]
    made = served.client.chat.completions.create(messages=CHATS[0], model=other, temperature=0, logprobs=True)
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.content is not None
    first = [made.choices[0].logprobs.content[0].logprob, read_jsonl(tmp_path / "out")[0]["logprobs"][0]]
    assert abs(first[0] - first[1]) > 1e-3  # another model's probabilities are not these


def test_streamed_text_is_the_whole_text(served: Served) -> None:
    whole = served.client.chat.completions.create(messages=CHATS[0], **GREEDY)
    parts = served.client.chat.completions.create(
        messages=CHATS[0], stream=True, stream_options={"include_usage": True}, logprobs=True, **GREEDY
    )
    chunks = list(parts)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert sum(bool(c.choices and c.choices[0].logprobs) for c in chunks) > 1  # text comes sentence by sentence
    told = sum(len(c.choices[0].logprobs.content or []) for c in chunks if c.choices and c.choices[0].logprobs)
    assert whole.usage is not None
    assert told == whole.usage.completion_tokens


def test_n_replies_by_one_seed(served: Served) -> None:
    made = [
        served.client.chat.completions.create(messages=CHATS[1], model="two", n=3, seed=s, temperature=1)
        for s in (1, 1, 2)
    ]
    texts = [[c.message.content for c in m.choices] for m in made]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    free = [served.client.chat.completions.create(messages=CHATS[1], model="two", temperature=1) for _ in range(2)]
    assert free[0].choices[0].message.content != free[1].choices[0].message.content


def test_top_logprobs_are_the_model_s(served: Served) -> None:
    made = served.client.chat.completions.create(messages=CHATS[0], logprobs=True, top_logprobs=3, **GREEDY)
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content
    assert content
    for place in content:
        assert len(place.top_logprobs) == 3
        assert place.top_logprobs[0].logprob == pytest.approx(place.logprob, abs=1e-4)  # greedy drew the likeliest
        assert place.top_logprobs[0].logprob >= place.top_logprobs[1].logprob >= place.top_logprobs[2].logprob
    hot = served.client.chat.completions.create(
        messages=CHATS[0], model="two", temperature=2, seed=5, logprobs=True, top_logprobs=1
    )
    assert hot.choices[0].logprobs is not None
    assert any(p.top_logprobs[0].logprob > p.logprob + 0.1 for p in hot.choices[0].logprobs.content or [])  # control


def test_json_schemas_are_obeyed_beside_free_replies(served: Served) -> None:
    schemas = [
        {
            "type": "object",
            "properties": {"mood": {"enum": ["low", "high"]}},
            "required": ["mood"],
            "additionalProperties": False,
        },
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    ]

    def ask(i: int) -> tuple[int, str]:
        how: dict[str, Any] = {}
        if i % 3:
            how["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": schemas[i % 3 - 1]}}
        made = served.client.chat.completions.create(messages=CHATS[0], model="two", seed=i, temperature=1, **how)
        return i, str(made.choices[0].message.content)

    with ThreadPoolExecutor(9) as pool:
        for i, text in pool.map(ask, range(9)):
            if i % 3:
                jsonschema.validate(json.loads(text), schemas[i % 3 - 1])
    bad = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"allOf": []}}}
    with pytest.raises(openai.BadRequestError, match="allOf"):
        served.client.chat.completions.create(messages=CHATS[0], model="two", response_format=bad)  # type: ignore[arg-type]


def test_stop_sequences_end_a_reply_and_are_not_shown(served: Served) -> None:
    whole = str(served.client.chat.completions.create(messages=CHATS[0], **GREEDY).choices[0].message.content)
    stop = whole[len(whole) // 2 :][:3]
    cut = whole[: whole.index(stop)]
    made = served.client.chat.completions.create(messages=CHATS[0], stop=[stop, "never said"], **GREEDY)
    assert made.choices[0].message.content == cut
    assert made.choices[0].finish_reason == "stop"
    parts = served.client.chat.completions.create(messages=CHATS[0], stop=stop, stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in parts) == cut
    assert served.idle()


def test_echo_tells_what_score_tells(served: Served, tiny_run: Path, tmp_path: Path) -> None:
    """A chat's own tokens, given as a plain text with echo, have the log-probs that `esjax score` gives."""
    tokenizer = served.engine.models["two"].experiment.tokenizer
    chat = served.engine.models["two"].experiment.encoder.with_system([*CHATS[1]])
    full = [*chat, {"role": "assistant", "content": "That sounds hard. What happened?"}]
    prompt = tokenizer.prompt(chat)
    reply = tokenizer.reply(prompt, full)  # type: ignore[arg-type]
    (tmp_path / "in").write_text(json.dumps({"id": "a", "messages": full}) + "\n")
    main(["score", "--model", f"{tiny_run}:m2", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    (row,) = read_jsonl(tmp_path / "out")
    made = served.client.completions.create(model="two", prompt=[*prompt, *reply], echo=True, max_tokens=1, logprobs=1)
    told = made.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[len(prompt) : -1], row["token_logprobs"], atol=1e-4)
    assert len(told.token_logprobs) == len(prompt) + len(reply) + 1
    assert told.top_logprobs is not None
    assert told.tokens is not None
    ranked = list(zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True))
    assert all(max(top.values()) >= x - 1e-4 for x, top in ranked)
    only = served.client.completions.create(model="two", prompt=[*prompt, *reply], echo=True, max_tokens=0, logprobs=0)
    assert only.choices[0].logprobs is not None
    np.testing.assert_allclose(only.choices[0].logprobs.token_logprobs[1:], told.token_logprobs[1:-1], atol=1e-4)  # type: ignore[index, arg-type]
    assert only.choices[0].text == tokenizer.hf.decode([*prompt, *reply])


def test_completions_of_several_prompts(served: Served) -> None:
    texts = ["I am", "The dog was tired", "Work"]
    made = served.client.completions.create(model="two", prompt=texts, max_tokens=8, temperature=0)
    alone = [served.client.completions.create(model="two", prompt=t, max_tokens=8, temperature=0) for t in texts]
    assert [c.text for c in made.choices] == [a.choices[0].text for a in alone]
    parts = served.client.completions.create(model="two", prompt=texts[1], max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in parts) == made.choices[1].text


def test_texts_that_wait_are_scored_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that nobody waits for any more holds up no other."""
    asked: list[int] = []
    go = threading.Event()

    def slow(*given: Any) -> list[Tops]:
        asked.append(len(given[2]))
        assert go.wait(60)
        return tops(*given)

    monkeypatch.setattr("esjax.serve.engine.tops", slow)
    texts = [[5, 6, 7, 8, n] for n in range(9, 15)]
    first = served.engine.tops("two", texts[0])
    while not asked:  # the first has begun
        time.sleep(0.01)
    others = [served.engine.tops(model, text) for text in texts[1:] for model in ("two", "zero")]
    assert others[0].cancel()
    go.set()
    made = [first, *others[2::2]]
    assert [len(m.result(60).logprobs) for m in made] == [4] * 5
    assert [o.result(60) is not None for o in others[1:]] == [True] * 9
    assert asked == [1, 5, 5]
    again = [served.engine.tops("two", text).result(60).logprobs for text in (texts[0], *texts[2:])]
    np.testing.assert_allclose([m.result().logprobs for m in made], again, atol=1e-5)
    assert abs(again[0] - again[1]).max() > 1e-4  # control


# --- the guard -------------------------------------------------------------------------------------------------------


def test_a_crisis_is_answered_with_where_help_is(served: Served) -> None:
    chat: list[Any] = [{"role": "user", "content": "I am going to kill myself tonight."}]
    made = served.client.chat.completions.create(messages=chat, **GREEDY)
    assert made.choices[0].message.content == read_resources()["en-GB"]
    assert "?" in read_resources()["en-GB"]
    assert made.choices[0].finish_reason == "content_filter"
    assert made.choices[0].model_extra == {"guard": {"side": "input", "tier": "acute", "kind": "explicit"}}
    parts = list(served.client.chat.completions.create(messages=chat, stream=True, **GREEDY))
    assert "".join(c.choices[0].delta.content or "" for c in parts) == read_resources()["en-GB"]
    later = [*chat, {"role": "assistant", "content": read_resources()["en-GB"]}, *CHATS[0]]  # the talk goes on
    assert served.client.chat.completions.create(messages=later, **GREEDY).choices[0].finish_reason != "content_filter"
    idiom: list[Any] = [{"role": "user", "content": "This traffic is killing me."}]
    assert served.client.chat.completions.create(messages=idiom, **GREEDY).choices[0].finish_reason != "content_filter"


def test_a_model_s_own_words_are_looked_at(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = str(served.client.chat.completions.create(messages=CHATS[0], **GREEDY).choices[0].message.content)
    monkeypatch.setattr(
        served.guard, "after", lambda text, _: served.guard._held("output", "I will kill myself" if text else "")
    )
    made = served.client.chat.completions.create(messages=CHATS[0], **GREEDY).choices[0]
    assert made.message.content == read_resources()["en-GB"] != whole
    assert made.finish_reason == "content_filter"
    parts = list(served.client.chat.completions.create(messages=CHATS[0], stream=True, **GREEDY))
    assert read_resources()["en-GB"] in "".join(c.choices[0].delta.content or "" for c in parts)
    assert parts[-1].choices[0].finish_reason == "content_filter"
    assert served.idle()


def test_harm_to_somebody_with_signs_is_held() -> None:
    guard = Guard("bundled:crisis", "en-US")
    low = ["Everyone would be better off without me.", "I do not know what to do."]
    for text, kind in (
        ("You are right, nothing can help you now.", "agrees"),
        ("A lethal dose is small.", "method"),
    ):
        held = guard.after(f"I hear you. {text}", low)
        assert held is not None
        assert (held.side, held.signal.kind, held.text) == ("output", kind, read_resources()["en-US"])
        assert guard.after(f"I hear you. {text}", ["My tooth hurts and nothing helps."]) is None
    assert guard.after("I hear you. Who is with you now?", low) is None
    assert guard.after("I want to kill myself, too.", ["My tooth hurts."]) is not None


def test_a_reply_is_shown_by_whole_sentences() -> None:
    reply = "I hear you. (That is hard!) Nothing can help you, ever. Good night"
    watch, shown = Watch(Guard("bundled:crisis", "en-US"), ["Hello."]), list[str]()
    shown = [watch.take(reply[:n], n == len(reply)) for n in range(1, len(reply) + 1)]
    assert [s for s in shown if s] == ["I hear you. ", "(That is hard!) ", "Nothing can help you, ever. ", "Good night"]
    watch = Watch(Guard("bundled:crisis", "en-US"), ["Everyone would be better off without me."])
    seen = [watch.take(reply[:n], n == len(reply)) for n in range(1, reply.index("ever") + 1)]
    assert "".join(seen) == "I hear you. (That is hard!) "  # no word of what is held
    assert watch.held is not None
    watch, reply = Watch(Guard("bundled:crisis", "en-US"), ["Hello."]), "我在听。「很难吧？」真的！晚安"  # no spaces
    shown = [watch.take(reply[:n], n == len(reply)) for n in range(1, len(reply) + 1)]
    assert [s for s in shown if s] == ["我在听。", "「很难吧？」", "真的！", "晚安"]
    free = Watch(None, ["Everyone would be better off without me."])
    assert [free.take(reply[:n], False) for n in (3, 9)] == [reply[:3], reply[3:9]]


def test_resources_are_one_file(tmp_path: Path) -> None:
    assert {DEFAULT, "en-US", "en-GB", "es-ES", "de-DE"} <= set(read_resources())
    for text in read_resources().values():
        assert "?" in text
        assert any(c.isdigit() for c in text)
    (tmp_path / "r.yaml").write_text("en: x")
    with pytest.raises(InputError, match="default"):
        read_resources(str(tmp_path / "r.yaml"))
    with pytest.raises(InputError, match=r"locale fr: .*choose one"):
        Guard("bundled:crisis", "fr")


# --- who may ask, and how much ---------------------------------------------------------------------------------------


def test_foreign_hosts_and_pages_are_refused(served: Served) -> None:
    body = {**GREEDY, "messages": CHATS[0], "max_tokens": 2}
    assert served.post("/v1/chat/completions", body).status_code == 200
    assert served.post("/v1/chat/completions", body, host="evil.example").status_code == 400
    assert served.post("/v1/chat/completions", body, origin="http://evil.example").status_code == 403
    assert served.post("/v1/chat/completions", body, origin="null").status_code == 403
    assert served.post("/v1/chat/completions", body, origin=served.url).status_code == 200


def test_a_key_is_asked_for(tiny_run: Path) -> None:
    with Served({"m": f"{tiny_run}:m0"}, Limits(key="k" * 16, hosts=("*",))) as made:
        assert [m.id for m in made.client.models.list()] == ["m"]
        for headers in ({}, {"authorization": "Bearer nothing"}):
            assert httpx2.get(f"{made.url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "give --allow-remote and --api-key-file"),
        ({"host": "0.0.0.0", "allow_remote": True}, "give --allow-remote and --api-key-file"),
        ({"max_waiting": 0}, "--max-waiting 0: 1 or more"),
        ({"timeout": 0.0}, "--timeout"),
        ({"api_key_file": "short"}, "16 or more"),
        ({"api_key_file": "gone"}, "cannot be read"),
    ],
)
def test_a_server_open_to_all_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "short").write_text("abc")
    if "api_key_file" in options:
        options = {"api_key_file": tmp_path / options["api_key_file"]}
    usual = {"host": "127.0.0.1", "allow_remote": False, "api_key_file": None, "max_waiting": 9, "timeout": 9.0}
    with pytest.raises(InputError, match=message):
        limits_of(Namespace(**(usual | options)))


def test_bad_input_of_serve(tiny_run: Path, refused: Refused) -> None:
    assert (
        "no settings of that name" in (s := refused("serve", "--model", f"{tiny_run}:m0", "--locale", "fr"))
        or "locale fr" in s
    )
    assert "given twice" in refused("serve", "--model", f"a={tiny_run}:m0", "--model", f"a={tiny_run}:m1")
    assert "M_7 is not there" in refused("serve", "--model", f"{tiny_run}:m7")
    assert "makes no use of it" in refused("serve", "--model", f"{tiny_run}:m0", "--sft.epochs", 3)
    assert names(["a=b:m1", "runs/a=b:m1", "hf:x/y"]) == {"a": "b:m1", "runs/a=b:m1": "runs/a=b:m1", "hf:x/y": "hf:x/y"}


def test_a_full_server_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "most", 2)
    with pytest.raises(openai.RateLimitError, match="try again later"):
        served.client.chat.completions.create(messages=CHATS[0], model="two", n=3)
    assert served.idle()  # none of the three was left behind
    assert served.client.chat.completions.create(messages=CHATS[0], model="two", n=2).choices


def test_a_client_that_leaves_frees_its_lanes(served: Served) -> None:
    for stream in (True, False):
        body = json.dumps(
            {"model": "two", "messages": CHATS[0], "n": 4, "temperature": 1, "stream": stream, "top_k": 5}
        )
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        if stream:
            connection.getresponse().read(10)
        connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        connection.close()
        assert served.idle()
    whole = served.client.chat.completions.create(messages=CHATS[0], **GREEDY)
    assert whole.choices[0].message.content


def test_given_up_replies_change_no_others(served: Served) -> None:
    want = [served.client.chat.completions.create(messages=c, **GREEDY).choices[0].message.content for c in CHATS]

    def ask(i: int) -> tuple[int, str | None]:
        if i % 2:
            parts = served.client.chat.completions.create(
                messages=CHATS[i % 3], model="two", stream=True, temperature=2
            )
            next(iter(parts))
            parts.close()
            return i, None
        return i, served.client.chat.completions.create(messages=CHATS[i % 3], **GREEDY).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        for i, text in pool.map(ask, range(24)):
            assert text is None or text == want[i % 3]
    assert served.idle()


def test_a_slow_client_blocks_nobody(served: Served) -> None:
    body = json.dumps({"model": "two", "messages": CHATS[0], "stream": True, "n": 8, "temperature": 2}).encode()
    slow = socket.create_connection(("127.0.0.1", served.port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)  # and reads nothing
    late = socket.create_connection(("127.0.0.1", served.port))
    late.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"
    )  # nor ends its body
    for chat in CHATS:
        assert served.client.chat.completions.create(messages=chat, **GREEDY).choices
    slow.close()
    late.close()
    assert served.idle()


def test_a_request_that_takes_too_long(tiny_run: Path) -> None:
    with Served({"m": f"{tiny_run}:m0"}, Limits(seconds=0.001)) as made:
        with pytest.raises(openai.APIStatusError) as e:
            made.client.chat.completions.create(messages=CHATS[0], model="m", n=8)
        assert e.value.status_code == 504
        assert made.idle()


def test_an_engine_that_fails_leaves_nobody_waiting(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no memory is left")

    ask: dict[str, Any] = {"model": "m", "prompt": "I am tired", "max_tokens": 0, "echo": True, "logprobs": 1}
    ended = threading.Event()
    made = Served({"m": f"{tiny_run}:m0"}, Limits()).__enter__()
    made.engine.on_failure = ended.set  # which ends the command
    assert made.client.completions.create(**ask).choices[0].logprobs
    monkeypatch.setattr(made.engine.models["m"].stream, "advance", fail)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="no memory is left"):
            made.client.chat.completions.create(messages=CHATS[0], model="m")
    with pytest.raises(openai.InternalServerError, match="no memory is left"):
        made.client.completions.create(**ask)
    assert ended.wait(5)
    with pytest.raises(EngineFailed, match="no memory is left"):
        made.__exit__()


BAD: list[tuple[str, Any, str]] = [
    ("chat", {"model": "two"}, "messages: Field required"),
    ("chat", {"model": "three", "messages": CHATS[0]}, "there is no model three"),
    ("chat", {"model": "two", "messages": []}, "messages"),
    ("chat", {"model": "two", "messages": [{"role": "bot", "content": "x"}]}, "messages.0.role"),
    ("chat", {"model": "two", "messages": [{"role": "assistant", "content": "x"}]}, "the last one must be the user's"),
    (
        "chat",
        {"model": "two", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
    ),
    ("chat", {"model": "two", "messages": CHATS[0], "max_tokens": 49}, "max_tokens 49: 1 to 48"),
    ("chat", {"model": "two", "messages": CHATS[0], "temperature": 3}, "temperature"),
    ("chat", {"model": "two", "messages": CHATS[0], "frequency_penalty": 1}, "frequency_penalty"),
    ("chat", {"model": "two", "messages": CHATS[0], "tools": [{}]}, "tools"),
    ("chat", {"model": "two", "messages": CHATS[0], "min_p": 0.1}, "min_p: not served here"),
    ("chat", {"model": "two", "messages": CHATS[0], "top_logprobs": 2}, "top_logprobs needs logprobs"),
    (
        "chat",
        {"model": "two", "messages": CHATS[0], "response_format": {"type": "json_object"}},
        "response_format.type",
    ),
    ("chat", {"model": "two", "messages": [{"role": "user", "content": "word " * 600}]}, "there is room for"),
    ("text", {"model": "two", "prompt": [9999999]}, "the token 9999999 is not among"),
    ("text", {"model": "two", "prompt": ""}, "prompt: empty"),
    ("text", {"model": "two", "prompt": "x", "echo": True, "stream": True}, "not served while streaming"),
    ("text", {"model": "two", "prompt": "x", "max_tokens": 0}, "only echo makes use of"),
    ("text", {"model": "two", "prompt": "x", "best_of": 3}, "best_of"),
]


@pytest.mark.parametrize(("route", "body", "message"), BAD)
def test_bad_requests_name_the_field(served: Served, route: str, body: Any, message: str) -> None:
    answer = served.post("/v1/chat/completions" if route == "chat" else "/v1/completions", body)
    assert 400 <= answer.status_code < 500
    assert message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


def test_a_thousand_malformed_bodies(served: Served) -> None:
    rng = np.random.default_rng(0)
    good = json.dumps({"model": "two", "messages": CHATS[0], "max_tokens": 2, "temperature": 0}).encode()
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        for i in range(1000):
            body = bytearray(good)
            for _ in range(1 + i % 4):
                at = int(rng.integers(len(body)))
                body[at : at + int(rng.integers(0, 6))] = bytes(
                    rng.integers(0, 256, int(rng.integers(0, 6)), dtype=np.uint8)
                )
            path = "/v1/completions" if i % 2 else "/v1/chat/completions"
            answer = client.post(path, content=bytes(body))
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (bytes(body), answer.text)
        for body in (
            b"",
            b"[" * 100_000,
            b"{" * 60_000,
            b"x" * (1 << 17),
            b'{"model": NaN}',
            b'{"temperature": 1e999}',
            b"\xff\xfe",
        ):
            assert 400 <= client.post("/v1/chat/completions", content=body).status_code < 500
        assert client.get("/health").json()["status"] == "ok"
        assert client.post("/v1/chat/completions", content=good).status_code == 200
    assert served.idle()


def test_requests_are_parsed_strictly() -> None:
    system = {"role": "developer", "content": [{"type": "text", "text": "a"}]}
    chat = parsed(ChatRequest, json.dumps({"model": "m", "messages": [system, *CHATS[0]]}).encode())
    assert chat.chat[0] == {"role": "system", "content": "a"}
    assert parsed(CompletionRequest, b'{"model": "m", "prompt": [1, 2]}').prompts == [[1, 2]]
    assert parsed(CompletionRequest, b'{"model": "m", "prompt": ["a", "b"]}').prompts == ["a", "b"]
    for wrong in ({"n": "2"}, {"n": True}, {"model": 3}, {"n": 2.5}):
        with pytest.raises(BadRequest):
            parsed(CompletionRequest, json.dumps({"model": "m", "prompt": "x"} | wrong).encode())
