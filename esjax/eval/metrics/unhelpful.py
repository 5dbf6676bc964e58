"""Unhelpful replies, by rules that need no judge.

Of five types (strategy mismatch, template reply, lack of empathy, emotion misread, advice too soon) rules can see three. They
are ours and coarse: what they find is a share to compare models by, not a verdict on one reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import regex

from esjax.corpus.text import is_empty, plain
from esjax.eval.metrics.generic import generic_share
from esjax.eval.metrics.metric import Metric
from esjax.eval.replies import Reply

TEMPLATE = 0.5  # a reply more of which is stock phrases is a template reply
SOON = 2  # advice in reply to so many messages of the seeker, or fewer, is too soon
ADVICE = regex.compile(
    r"\b(?:you (?:should|must|need to|have to|ought to|could try|might want to|can try|may want to)|try (?:to|not to|and|\w+ing)"
    r"|have you (?:tried|considered|thought (?:about|of))|why don't you|how about (?:you )?\w+ing"
    r"|i (?:suggest|recommend|(?:would|'d) (?:suggest|recommend|advise))|my advice|make sure (?:to|you|that)|consider \w+ing"
    r"|it'?s (?:best|a good idea|important|helpful) to|here are (?:some|a few)|focus on \w+ing|start by \w+ing)\b"
)
CARE = regex.compile(
    r"\?|\b(?:sorry|sounds?|hear(?:ing)?|understand(?:able|s)?|feel(?:s|ing|ings)?|felt|hard|tough|difficult|pain(?:ful)?|hurts?|"
    r"heavy|lonely|afraid|scar(?:ed|y)|sad|grief|angry|anxious|worr(?:y|ied|ies|ying)|overwhelm(?:ed|ing)?|exhaust(?:ed|ing)|tired|"
    r"frustrat(?:ed|ing)|awful|terrible|unfair|proud|glad|happy|brave|courage|thank|makes sense|no wonder|must (?:be|have)|"
    r"with you|you care|miss)\b"
)


def template(r: Reply) -> bool:
    return generic_share(r.text) >= TEMPLATE


def without_empathy(r: Reply) -> bool:
    """Neither a word of feeling or acknowledgement, nor a question."""
    return CARE.search(plain(r.text).lower()) is None


def too_soon(r: Reply) -> bool:
    """Advice before the seeker has said much, and no question beside it."""
    said = sum(m["role"] == "user" and not m["content"].startswith("(") for m in r.messages)
    text = plain(r.text).lower()
    return said <= SOON and "?" not in text and ADVICE.search(text) is not None


def unhelpful(r: Reply) -> bool:
    return is_empty(r.text) or template(r) or without_empathy(r) or too_soon(r)


def _share(name: str, label: str, rule: Callable[[Reply], bool]) -> Metric:
    def each(replies: Sequence[Reply]) -> np.ndarray:
        return np.asarray([float(rule(r)) for r in replies])

    return Metric(name, label, "reply", "patterns", "lower", "ours", each, share=True)


METRICS = [
    _share("unhelpful", "unhelpful by our rules", unhelpful),
    _share("template_reply", "template replies", template),
    _share("no_empathy", "without a word of empathy", without_empathy),
    _share("advice_too_soon", "advice too soon", too_soon),
]
