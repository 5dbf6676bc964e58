"""Preference pairs: contexts drawn for a round, pairs with their provenance, and the rows that DPO trains on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Dialogue, Message
from esjax.corpus.readers import preference
from esjax.corpus.readers.base import json_rows
from esjax.corpus.sources import check_messages
from esjax.corpus.text import has_halves, spaced
from esjax.errors import InputError
from esjax.rows import Rows, prompt_with_replies, trunk_with_replies
from esjax.run.jsonl import Line, require, where_of
from esjax.safety.screen import Screen
from esjax.settings.schema import DpoSettings
from esjax.tokens.batches import share_trunks
from esjax.tokens.encode import Encoder, Pair, Prompt


@dataclass(frozen=True)
class Context:
    """C_n: what a supporter turn answers."""

    id: str  # DIALOGUE/TURN
    prompt: Prompt

    @property
    def messages(self) -> list[Message]:
        """The chat that is answered."""
        return self.prompt.messages

    @property
    def reference(self) -> str:
        """The corpus' own answer."""
        return self.prompt.chat[self.prompt.stop]["content"]

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return len(self.prompt.ids)


def contexts(dialogues: list[Dialogue], encoder: Encoder, room: int, file: str, remedy: str) -> list[Context]:
    """The contexts of all supporter turns, cut to ``room`` tokens; those too long even then are left out and counted.

    Raises InputError naming the ``file`` and the ``remedy`` when none is left.
    """
    out = []
    for prompt in encoder.prompts([encoder.chat(d) for d in dialogues], room):
        dialogue = dialogues[prompt.number]
        turn = prompt.stop - (len(prompt.chat) - len(dialogue.turns))
        out.append(Context(f"{dialogue.id}/{turn}", prompt))
    if not out:
        raise InputError(f"{file}: no context of {len(dialogues)} dialogues fits {max(room, 0)} tokens; {remedy}")
    return out


def draw(pool: list[Context], count: int | None, seed: tuple[int, ...]) -> list[Context]:
    """``count`` contexts without replacement (all when None), in the order of the corpus."""
    if count is not None and count < len(pool):
        chosen = np.random.default_rng(seed).choice(len(pool), count, replace=False)
        pool = [pool[i] for i in sorted(chosen)]
    return pool


def read_pairs(path: Path) -> list[Line]:
    """Read preference pairs from anywhere, in any of TRL's forms, as its conversational one.

    Raises InputError naming file and line.
    """
    rows = json_rows(path)
    if not rows:
        raise InputError(f"{path}: empty; expected one JSON object a line with prompt, chosen and rejected")
    for row in rows:
        require(row, preference.FORMAT.fields)
        try:
            preference.normal(row)
        except ValueError as e:
            raise InputError(f"{row.where}: {e}") from e
        row["prompt"] = check_messages(row["prompt"], f"{row.where}, prompt", last="user")
        for side in ("chosen", "rejected"):
            row[side] = check_messages(row[side], f"{row.where}, {side}", last="assistant")
            if len(row[side]) != 1:
                raise InputError(
                    f"{row.where}: {side} must be one assistant message; a pair's prompt must be common to both"
                )
        if row["chosen"] == row["rejected"]:
            raise InputError(f"{row.where}: chosen and rejected are the same; take the pair out")
    return rows


class ScreenedPairs(NamedTuple):
    """The pairs that are trained on, and what was found in all."""

    kept: list[Line]
    dropped: Counter[str]
    found: list[dict[str, Any]]  # rows of screened.jsonl


def screened_pairs(pairs: list[Line], screen: Screen) -> ScreenedPairs:
    """Leave out the pairs that hold what is dropped, in the prompt or a reply, and those with half a character.

    Raises InputError when none is left.
    """
    kept, dropped, found = list[Line](), Counter[str](), list[dict[str, Any]]()
    for number, pair in enumerate(pairs, start=1):
        said = [*pair["prompt"], *pair["chosen"], *pair["rejected"]]
        reasons = ["lone_surrogates"] if any(has_halves(m["content"]) for m in said) else []
        for turn, m in enumerate(said) if not reasons else ():
            for kind, excerpt in screen.find(m["content"], supporter=m["role"] == "assistant"):
                if kind == "crisis" and m["role"] != "user" and turn < len(pair["prompt"]):
                    continue  # the supporter asked about it
                action = screen.actions[kind]
                where = {"id": str(pair.get("id", number)), "turn": turn}
                found.append({"source": "pairs", "kind": kind, "action": action, **where, "excerpt": excerpt})
                reasons += [kind] if action == "drop" else []
        if reasons:
            dropped[reasons[0]] += 1
        else:
            kept.append(pair)
    if not kept:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise InputError(
            f"{pairs[0].where} and all {len(pairs)} pairs are left out ({counts}; see the screen settings); give other pairs"
        )
    return ScreenedPairs(kept, dropped, found)


def pair_of(row: dict[str, Any], number: int) -> Pair:
    """A pair's texts; ``number`` is what to call it where nothing says where it stands."""
    return Pair(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"], where_of(row, number))


class Trunk(NamedTuple):
    """A row of one segment: a trunk with a chosen branch 2p - 1 and a rejected branch 2p for its p-th member."""

    members: list[int]  # which pairs
    rows: Rows


def trunks(pairs: Sequence[dict[str, Any]], encoder: Encoder, settings: DpoSettings) -> list[Trunk]:
    """The rows of pairs: one for each pair, or with ``dpo.trunk: dialogue`` one for all pairs whose prompts share a trunk.

    Sharing needs the tokens of a prompt to begin those of a longer one. Where a chat template breaks that, although the
    messages do, the pairs stay apart; ``encoder.counts`` tells how many ("unshared").
    """
    made = encoder.pairs([pair_of(p, number) for number, p in enumerate(pairs, start=1)])
    if settings.trunk == "prompt":
        return [Trunk([i], lighter_tails(prompt_with_replies(*pair), settings)) for i, pair in enumerate(made)]
    prompts = [ids for ids, _ in made]
    groups = share_trunks(prompts, [sum(len(r) + 1 for r in replies) for _, replies in made], settings.row_length)
    encoder.counts["unshared"] = _broken_by_template(pairs, prompts)
    out = []
    for members in groups:
        stem = max((prompts[i] for i in members), key=len)
        branches = [(len(prompts[i]), reply) for i in members for reply in made[i][1]]
        out.append(Trunk(members, lighter_tails(trunk_with_replies(stem, branches), settings)))
    return out


def lighter_tails(rows: Rows, settings: DpoSettings) -> Rows:
    """A segment whose branches 2p - 1 and 2p are a pair: what is behind the shorter reply's length weighs dpo.tail_weight."""
    if settings.tail_weight == 1:
        return rows
    weight = rows.weight.copy()
    places = [np.flatnonzero((rows.branch == b) & (weight > 0)) for b in range(1, int(rows.branch.max()) + 1)]
    for chosen, rejected in zip(places[::2], places[1::2], strict=True):
        shorter = min(len(chosen), len(rejected))
        weight[chosen[shorter:]] = weight[rejected[shorter:]] = settings.tail_weight
    return rows._replace(weight=weight)


def _broken_by_template(pairs: Sequence[dict[str, Any]], prompts: list[list[int]]) -> int:
    """How many prompts begin another one as messages, but not as tokens."""
    digests: list[bytes] = []  # of each whole prompt
    longer: dict[bytes, list[int]] = {}  # digests of the beginnings of all prompts, and the tokens of one that goes on
    for pair, ids in zip(pairs, prompts, strict=True):
        *beginnings, whole = _beginnings(pair["prompt"])
        digests.append(whole)
        for digest in beginnings:
            longer.setdefault(digest, ids)
    goes_on = [longer.get(digest) for digest in digests]
    return sum(more is not None and more[: len(ids)] != ids for more, ids in zip(goes_on, prompts, strict=True))


def _beginnings(messages: list[Message]) -> list[bytes]:
    """A digest of the first message, the first two, ..., all of them."""
    running, out = hashlib.sha256(), []
    for message in messages:
        running.update(json.dumps([message["role"], message["content"]]).encode())
        out.append(running.digest())
    return out


def length_ratio(pairs: Sequence[dict[str, Any]]) -> float:
    """Mean words of chosen over mean words of rejected: refinements tend to grow, so every round logs it."""
    words = {side: sum(len(spaced(p[side][0]["content"])) for p in pairs) for side in ("chosen", "rejected")}
    return words["chosen"] / words["rejected"]


def counted(counts: Mapping[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
