"""Which support a person wants and a reply offers, by embeddings: how far the two are apart is the preference discrepancy.

Ours. There are six kinds of support; each has sentences in which a seeker asks for it and in which a supporter gives it. A text's
kinds are the softmax of how like it is to the likeliest sentence of each kind. The discrepancy of a reply is half the sum of
absolute differences between the two distributions: 0 where it offers what is wanted, 1 where it offers something else alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from esjax.eval.replies import Reply

SHARPNESS = 10.0  # by which likenesses are multiplied before the softmax
# kind -> what a seeker says who wants it, what a supporter says who gives it
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "listening": (
        ("I just need somebody to listen to me.", "Nobody understands what I am going through."),
        ("It sounds like you feel hurt by what happened.", "I hear how hard this is for you."),
    ),
    "comfort": (
        ("I am so scared that I will never get better.", "I feel like a failure and cannot stop crying."),
        ("You are doing better than you think, and it will pass.", "You are not alone in this, I believe in you."),
    ),
    "exploring": (
        ("I do not know why I feel this way.", "I cannot make sense of it."),
        ("What happened before you began to feel this way?", "Can you tell me more about that?"),
    ),
    "information": (
        ("Is it normal to feel like this?", "Do you know how this works?"),
        ("Many people feel this way for some months.", "There is a service that helps with this."),
    ),
    "advice": (
        ("What should I do?", "How can I tell them? I need some ideas."),
        ("You could try to talk to your boss about it.", "Make a list, and begin with the smallest step."),
    ),
    "company": (
        ("Thank you, that helped. How are you?", "Hello, are you there?"),
        ("You are welcome, have a good evening.", "Hi, how are you today?"),
    ),
}


def discrepancies(embed: Callable[[Sequence[str]], np.ndarray], replies: Sequence[Reply]) -> np.ndarray:
    """The discrepancy of each reply, 0 to 1; NaN of an empty one. What is wanted is read from the seeker's last message."""
    last = [next(m["content"] for m in reversed(r.messages) if m["role"] == "user") for r in replies]
    wanted, offered = _kinds(embed, last, 0), _kinds(embed, [r.text for r in replies], 1)
    out: np.ndarray = np.where([bool(r.text) for r in replies], np.abs(wanted - offered).sum(1) / 2, np.nan)
    return out


def _kinds(embed: Callable[[Sequence[str]], np.ndarray], texts: Sequence[str], side: int) -> np.ndarray:
    """How much of each kind a text has, float [texts, kinds]."""
    sentences = [s for kind in KINDS.values() for s in kind[side]]
    alike = embed(texts) @ embed(sentences).T
    best = alike.reshape(len(texts), len(KINDS), -1).max(2) * SHARPNESS
    weights = np.exp(best - best.max(1, keepdims=True))
    out: np.ndarray = weights / weights.sum(1, keepdims=True)
    return out
