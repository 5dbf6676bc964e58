"""What a reply takes for granted of the seeker and nothing in the conversation says.

A rule, ours and coarse: a reply that speaks of "your sister" where nobody spoke of a sister has made her up. What everybody has
(feelings, a life, a day) is taken for granted of nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

from esjax.corpus.text import plain, words
from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import same_word
from esjax.eval.replies import Reply

OWNED = regex.compile(r"\byour (?:own |new |old |whole |entire |current |recent |best |dear |little )*([a-z]{3,})")
# What anybody may be told to have, whatever was said.
COMMON = frozenset(
    "feelings feeling emotions emotion emotional thoughts thought mind heart head body life day days night time situation "
    "experience experiences story struggle struggles pain hurt worry worries concern concerns fear fears needs need side best "
    "way own problem problems issue issues question questions options goals goal strength strengths courage effort efforts "
    "support choice choices decision decisions future past present self worth value values shoes place position part own words "
    "voice perspective view point trust message reply response sharing openness honesty control power breath energy mood "
    "health mental physical personal wellbeing comfort space pace reaction reactions reason reasons frustration sadness anger "
    "grief anxiety stress loneliness disappointment guilt shame stomach chest shoulders eyes hands face".split()
)


def made_up(r: Reply) -> list[str]:
    """Things of the seeker's that the reply names and no turn before it has a word for."""
    said = {w for m in r.messages if m["role"] != "system" for w in words(plain(m["content"]))}
    named = [w for w in OWNED.findall(plain(r.text).lower()) if w not in COMMON]
    return [w for w in named if not any(same_word(w, s) for s in said)]


def unsupported(replies: Sequence[Reply]) -> np.ndarray:
    return np.asarray([float(bool(made_up(r))) for r in replies])


METRICS = [
    Metric(
        "unsupported",
        'names a "your ..." that nobody spoke of',
        "reply",
        "patterns",
        "lower",
        "ours",
        unsupported,
        share=True,
    )
]
