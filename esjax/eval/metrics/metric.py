"""What every metric says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from esjax.eval.replies import Reply


@dataclass(frozen=True)
class Metric:
    """One number about replies.

    Of level "reply" it is the mean of one number a reply, which ``each`` gives (float [replies]; NaN where a reply has none).
    Of level "corpus" it is one number of all replies together: ``whole`` of them, or ``whole_of`` the sum of ``counts``, of
    shape [replies, k], where that is enough. A metric that needs a model has none of these: its values are made elsewhere.
    """

    name: str
    label: str  # in tables
    level: Literal["reply", "corpus"]
    tokens: str  # how texts are cut
    better: Literal["higher", "lower", "neither"]
    source: str  # whose definition it is
    each: Callable[[Sequence[Reply]], np.ndarray] | None = None
    whole: Callable[[Sequence[Reply]], float] | None = None
    counts: Callable[[Sequence[Reply]], np.ndarray] | None = None
    whole_of: Callable[[np.ndarray], float] | None = None
    share: bool = False  # of replies for which something is so: shown in per cent
