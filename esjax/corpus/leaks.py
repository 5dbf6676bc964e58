"""Leaks: the same dialogue, a near copy of it, or its situation in two splits of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import NamedTuple

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.text import words
from esjax.run.memo import remembered

# Shingles are pairs of words in a row. In ESConv two dialogues share at most a tenth of theirs; a copy in which a fifth of the
# words is another shares half, as does a dialogue that was cut in the middle.
SIMILAR = 0.3
PERMUTATIONS, BANDS = 255, 85  # MinHash (Broder 1997): three hashes a band find pairs of 0.35 in 97 of 100 cases
SITUATION_WORDS = 8  # of the shortest situation that two people hardly describe alike


class Leak(NamedTuple):
    """Two dialogues of different splits that should not be there both."""

    kind: str  # "copy", "near copy" or "situation"
    first: str  # SPLIT ID
    second: str
    similarity: float

    def __str__(self) -> str:
        return f"{self.first} and {self.second} ({self.kind}, {self.similarity:.0%} alike)"


def find_leaks(splits: Mapping[str, Sequence[Dialogue]], folder: Path | None = None) -> list[Leak]:
    """All leaks between the splits, which are named; within one there are none. Each pair of dialogues is told of once.

    ``folder``: where what was found is kept.
    """
    texts = ([name, d.id, d.situation, [t.text for t in d.turns]] for name, split in splits.items() for d in split)
    hangs_on = chain([SIMILAR, PERMUTATIONS, BANDS], texts)
    return [Leak(*found) for found in remembered(folder, hangs_on, lambda: _leaks(splits))]


def _leaks(splits: Mapping[str, Sequence[Dialogue]]) -> list[Leak]:
    from rensa import RMinHash, RMinHashLSH

    names = [(split, d) for split, dialogues in splits.items() for d in dialogues]
    said = [[word for turn in d.turns for word in words(turn.text)] for _, d in names]
    shingles = [{f"{a} {b}" for a, b in pairwise(text)} or set(text) for text in said]
    wholes = [tuple(text) for text in said]
    situations = [tuple(words(d.situation)) for _, d in names]
    table = RMinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS, num_bands=BANDS)
    hashes = [RMinHash(num_perm=PERMUTATIONS, seed=1) for _ in names]
    for n, (minhash, own) in enumerate(zip(hashes, shingles, strict=True)):
        minhash.update(sorted(own))
        table.insert(n, minhash)
    candidates = {(other, n) for n, minhash in enumerate(hashes) for other in table.query(minhash) if other < n}
    for texts in (wholes, [s if len(s) >= SITUATION_WORDS else () for s in situations]):
        same: dict[tuple[str, ...], list[int]] = {}
        for n, text in enumerate(texts):
            if text:
                same.setdefault(text, []).append(n)
        candidates |= {pair for group in same.values() for pair in combinations(group, 2)}
    found = []
    for a, b in sorted(candidates):
        if names[a][0] == names[b][0]:
            continue
        shared, kind = len(shingles[a] & shingles[b]), ""
        alike = shared / max(1, len(shingles[a] | shingles[b]))
        if wholes[a] == wholes[b]:
            kind, alike = "copy", 1.0
        elif alike >= SIMILAR:
            kind = "near copy"
        elif situations[a] == situations[b] and len(situations[a]) >= SITUATION_WORDS:
            kind, alike = "situation", 1.0
        if kind:
            first, second = f"{names[a][0]} {names[a][1].id}", f"{names[b][0]} {names[b][1].id}"
            found.append(Leak(kind, first, second, alike))
    return found
