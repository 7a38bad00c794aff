"""Whether torchrun started this process, and among how many; torch is not loaded for that."""

import os

from mutune.errors import require_number
from mutune.training.config import MOST_THREADS

OMP = "OMP_NUM_THREADS"


def is_launched() -> bool:
    """Whether this is one of the processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def rank() -> int:
    """Which of them this is; 0 where there is one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def processes() -> tuple[int, int]:
    """How many processes torchrun started, on all hosts and on this one."""
    return (int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])) if is_launched() else (1, 1)


def own_device(name: str) -> str:
    """Of GPUs, this process's."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if is_launched() and name == "cuda" else name


def share(cores: int) -> int:
    """Of so many cores, this process's among those that torchrun started on this host."""
    return max(1, cores // processes()[1])


def asked_threads() -> int | None:
    """The threads that OMP_NUM_THREADS asks for; None where it is not set, or as torchrun sets it.

    torchrun sets it to 1 for several processes on a host where nobody else did: 1 is then no wish of the user's.

    Raises:
        Refusal: more than `MOST_THREADS`.
    """
    first = os.environ.get(OMP, "").partition(",")[0].strip()  # a list has the threads of nested regions
    if not first.isdecimal() or int(first) < 1:
        return None
    require_number(OMP, int(first), at_most=MOST_THREADS, example=2, whole=True)
    return None if int(first) == 1 and processes()[1] > 1 else int(first)


def speaks(for_lost: bool = False) -> bool:
    """Whether this process tells what concerns all of them: the first of its host.

    Args:
        for_lost: whether it may be that one that is gone, so that the second speaks too.
    """
    return not is_launched() or os.environ.get("LOCAL_RANK") in ("0", *(["1"] if for_lost else []))
