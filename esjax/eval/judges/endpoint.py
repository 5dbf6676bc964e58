"""A judge behind an OpenAI-compatible address: retries, a rate limit, and nothing lost of what was answered."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import requests

from esjax.errors import InputError, Stopped, TransientError
from esjax.eval.judges.judge import Answer, Done, Question
from esjax.runtime.context import current
from esjax.settings.schema import JudgeSettings

KEY = "ESJAX_JUDGE_KEY"  # the environment variable that holds an endpoint's key
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one


class Endpoint:
    """A model that answers at URL/chat/completions; named by ``endpoint:URL#MODEL``."""

    alone = True

    def __init__(self, address: str, settings: JudgeSettings) -> None:
        """Raises InputError where the address names no model."""
        self.url, _, self.model = address.partition("#")
        if not re.match(r"https?://[^/]+", self.url) or not self.model:
            raise InputError(
                f"eval.judge.source=endpoint:{address}: expected endpoint:http(s)://HOST/v1#MODEL, such as "
                "endpoint:http://127.0.0.1:8000/v1#judge"
            )
        self.name, self._settings = f"endpoint:{address}", settings
        self._pace, self._next = threading.Lock(), 0.0
        self._given_up = threading.Event()

    def ask(self, questions: Sequence[Question], done: Done) -> None:
        self._given_up.clear()
        pool = ThreadPoolExecutor(self._settings.at_once)
        waiting: dict[Future[Answer], int] = {}
        left = iter(range(len(questions)))
        error: BaseException | None = None
        with current().stop.deferred() as stops:
            try:
                while True:
                    while error is None and len(waiting) < self._settings.at_once:
                        if (i := next(left, None)) is None:
                            break
                        waiting[pool.submit(self._one, questions[i])] = i
                    if not waiting:
                        break
                    ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in ended:
                        i = waiting.pop(future)
                        if (failed := future.exception()) is None:
                            done(i, future.result())
                        else:
                            error = error or failed
                            self._given_up.set()  # the others, which are under way, are still waited for
                    if error is None and stops():
                        error = Stopped()
                        self._given_up.set()
            finally:
                self._given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if error is not None:
            raise error

    def _one(self, question: Question) -> Answer:
        """One answer, after as many attempts as it takes. Raises InputError, TransientError."""
        said = "nothing"
        for attempt in range(ATTEMPTS):
            pause = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25) if attempt else 0.0
            if self._given_up.wait(pause):
                raise TransientError(f"{self.url}: given up, as another question failed")
            self._keep_pace()
            try:
                response = requests.post(
                    f"{self.url.rstrip('/')}/chat/completions",
                    json={
                        "model": self.model,
                        "messages": question.messages,
                        "temperature": 0,
                        "max_tokens": self._settings.max_tokens,
                    },
                    headers={"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {},
                    timeout=self._settings.timeout,
                )
            except requests.RequestException as e:
                said = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
                continue
            said = f"{response.status_code} {' '.join(response.text.split())[:160]}"
            if response.status_code in (408, 409, 429) or response.status_code >= 500:
                self._back_off(response.headers.get("Retry-After"))
                continue
            if response.status_code != 200:
                raise InputError(f"{self.url}: the judge refuses the question ({said}); the key is taken from ${KEY}")
            try:
                body = response.json()
                text = body["choices"][0]["message"]["content"] or ""
                return Answer(chosen(text, question.choices), *_paid(body))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                continue
        raise TransientError(
            f"{self.url}: no answer after {ATTEMPTS} attempts (the last: {said}); what was answered is kept, run the same "
            "command again"
        )

    def _keep_pace(self) -> None:
        """Wait until the rate limit allows another request."""
        if self._settings.per_minute is None:
            return
        with self._pace:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 60 / self._settings.per_minute
        self._given_up.wait(at - now)

    def _back_off(self, seconds: str | None) -> None:
        if seconds is not None and re.fullmatch(r"\d{1,4}(\.\d+)?", seconds):
            self._given_up.wait(min(float(seconds), 120.0))


def _paid(body: dict[str, Any]) -> tuple[int, int]:
    usage = body.get("usage") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def chosen(text: str, choices: Sequence[str]) -> tuple[float, ...] | None:
    """What a judge's words choose: a line that is a choice alone, or what follows "answer" or "verdict"; the last such.

    None where there is none: an article "A" in a sentence is no verdict.
    """
    one = "|".join(map(re.escape, choices))
    alone = rf"^[\s\"'(\[*]*({one})[\s\"')\]*.:!]*(?:/\s*{re.escape(choices[-1])}\s*)?$"
    named = rf"\b(?:answer|verdict|rating|score)\b(?:\s+is)?[\s:*=\"'(\[]*({one})\b"
    found = [(m.start(1), m[1].upper()) for m in re.finditer(alone, text, re.MULTILINE | re.IGNORECASE)]
    found += [(m.start(1), m[1]) for m in re.finditer(rf"(?i:{named})", text) if m[1] in choices]
    if not found:
        return None
    last = max(found)[1]
    return tuple(float(choice == last) for choice in choices)
