"""The shapes of the sampler's programs: one function of what is asked for, which runs and ``esjax plan`` call."""

from __future__ import annotations

import math
from typing import NamedTuple

from esjax.runtime.mesh import batch_groups, check_split

BUCKET = 128  # rows have a multiple of so many slots, so that a run compiles a handful of programs
# Windows of one prefill, of a small one, and their width. More would hardly be faster, only more often padding; on CPU one
# size is enough, and one program less to compile.
WINDOWS = {"cpu": (4, 4, 64), "gpu": (32, 8, 128), "tpu": (8, 8, 128)}
# A row's rings together have a multiple of so many places: keys then lie in whole tiles. A TPU lays an array that does not
# end on one out another way, and copies all of it in every prefill.
RINGS = {"cpu": 1, "gpu": 64, "tpu": 128}
SHARED_LANES = 2  # lanes that read a row together, where prompts share trunks


class Need(NamedTuple):
    """What is to be sampled, in tokens."""

    longest: int  # the longest prompt that others share a part of, or that shares nothing
    beyond: int = 0  # the most that others have beyond that part; there is room for one more than the lanes of a row
    new: int = 0  # the longest reply
    least: int = 0  # what lies beside the longest at least, if that is more


class Shapes(NamedTuple):
    """Static sizes: programs are compiled once for each."""

    rows: int  # R; each device that shares the batch has as many of them
    lanes: int  # M, that read a row together
    slots: int  # T, of a row
    new: int  # N, of a lane's ring
    windows: int  # that one prefill computes on each device ...
    few: int  # ... and that a smaller one computes, for when no more wait
    width: int  # C, slots of a window


def shapes(replies: int, need: Need, platform: str, lanes: int = 0, shared: bool = True) -> Shapes:
    """The shapes for so many ``replies`` at once; ``lanes`` a row, or decided by whether prompts have ``shared`` beginnings.

    Raises InputError where the devices do not divide the replies.
    """
    check_split("replies at once (evolve.batch, in `esjax sample` reply.batch)", replies)
    if not lanes:
        lanes = SHARED_LANES if shared and replies % (batch_groups() * SHARED_LANES) == 0 else 1
    windows, few, width = WINDOWS[platform]
    room = max(need.longest + max(need.beyond * (lanes + 1), need.least), width)
    slots, (windows, few) = -(-room // BUCKET) * BUCKET, (max(1, n // batch_groups()) for n in (windows, few))
    multiple = RINGS[platform] // math.gcd(RINGS[platform], lanes)
    ring = -(-need.new // multiple) * multiple
    return Shapes(replies // lanes, lanes, slots, ring, windows, few, width)
