"""Large pages of memory for what a process computes on its host.

Linux gives memory out in pages of 4 KiB and writes zeros to each when it is first touched. A training step on a CPU allocates
its gigabytes anew every time, so that it waits for hundreds of thousands of pages; of pages of 2 MiB it waits for one in 512.
Where the kernel gives those to processes that ask (``madvise``, the default of most distributions), glibc's allocator asks
only if a variable of the environment said so when the process began.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def asking_for_large_pages(environment: Mapping[str, str], kernel: Path = KERNEL) -> dict[str, str] | None:
    """The environment in which allocations ask for large pages; None where there is nothing to ask, or somebody decided."""
    given = environment.get(VARIABLE, "")
    if TUNABLE in given:
        return None
    try:
        asked = "[madvise]" in kernel.read_text()
    except OSError:  # not Linux, or a container that hides it
        return None
    return {**environment, VARIABLE: f"{given}:{TUNABLE}=1".lstrip(":")} if asked else None


def restart_with_large_pages(kernel: Path = KERNEL) -> None:
    """Begin this process again, as it was called, in such an environment. Returns where that would change nothing."""
    environment = asking_for_large_pages(os.environ, kernel)
    if environment is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
