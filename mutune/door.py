"""The contract every command keeps: `--help`, one sentence and exit code 2 for bad input, and what signals do.

Exit codes: 0 done, 1 failed while working, 2 refused, 3 verdict not good enough (with `require_go=true`),
130 and 143 after SIGINT and SIGTERM, once the work has saved what it can, 141 where nobody reads what it prints.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, TypeVar

from mutune.compose import compose
from mutune.config import DoorConfig
from mutune.errors import Refusal, require
from mutune.help import help_text
from mutune.training.launched import rank, speaks

T = TypeVar("T", bound="DoorConfig")

CACHED = "tokenized text in the cache"
SWITCHES = ("dry_run", "fit", "overwrite", "require_go")  # keys that are true or false
SILENCE = 3.0  # seconds in which the first process speaks for all
OK, FAILED, REFUSED, NOT_GO, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 3, 130, 141, 143


def rehearsed(but: str = "", lack: Refusal | None = None, to_do: str = "start") -> int:
    """Print the last line of a dry run; returns its exit code.

    Args:
        but: what was written all the same, or nothing.
        lack: why the work would be refused.
        to_do: what the work would do.

    Raises:
        Refusal: the lack, where there is one, so that a script does not start what would be refused.
    """
    written = f"dry run: nothing was written{f' but {but}' if but else ''}"
    print(f"{written}." if lack else f"{written}; leave out dry_run=true to {to_do}.", flush=True)
    if lack:
        raise lack
    return OK


class WorkFailed(Exception):
    """The work itself failed in a known way; the message says what happened and what to do. Exit code 1.

    All processes of a run raise it, where there are several.
    """

    shared = True


class ProcessLost(WorkFailed):
    """Another process of the run is gone."""


def drawn(draw: Callable[[], list[Path]], what: str = "figures") -> list[Path]:
    """The files that `draw` makes. Where it cannot, a note on stderr and none: results do not wait for pictures."""
    try:
        return draw()
    except (Refusal, OSError) as error:
        print(f"{what:<10} not made: {error}", file=sys.stderr)
        return []


class Terminated(BaseException):
    """SIGTERM arrived."""


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM only asks: work looks at `requested`, saves, and obeys."""

    def __init__(self, patient: bool = False) -> None:
        """`patient`: a second signal waits too, as torchrun sends one on top of the terminal's."""
        self._patient = patient
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signum is not None

    @property
    def signal(self) -> str:
        """The signal that has arrived, as a user calls it; empty where none has."""
        if self._signum is None:
            return ""
        return "Ctrl-C" if self._signum == signal.SIGINT else "SIGTERM"

    def obey(self) -> None:
        """End the work: raise what the door turns into exit code 130 or 143."""
        raise KeyboardInterrupt if self._signum == signal.SIGINT else Terminated

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and not self._patient:
            self.obey()  # the second signal does not wait
        self._signum = signum


def enter(
    door: str,
    schema: type[T],
    work: Callable[[T], int],
    groups: Sequence[str],
    argv: Sequence[str],
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run one command and return its exit code.

    Args:
        door: the command's name, as in `python -m mutune.<door>`.
        schema: its configuration's dataclass.
        work: takes the validated configuration, returns an exit code.
        groups: the config groups it has, for `--help`.
        argv: the command line after the command.
        elsewhere: keys of other doors that are often given to this one, and what to write before them there.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        for word, following in zip(argv, [*argv[1:], ""], strict=True):
            _check_word(word, following, elsewhere)
        code = _opened(door, schema, work, groups, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes at its end, and complains
        return UNREAD
    except Refusal as refusal:
        return _end(door, refusal, REFUSED)
    except (WorkFailed, OSError) as failure:  # OSError: a full disk, a folder where a file goes
        return _end(door, failure, FAILED)
    except KeyboardInterrupt:
        return _end(door, f"interrupted; {_after(argv)}.", INTERRUPTED)
    except Terminated:
        return _end(door, f"terminated; {_after(argv)}.", TERMINATED)


def _after(argv: Sequence[str]) -> str:
    """What follows an interruption."""
    return "nothing was written" if {"dry_run=true", "fit=true"} & set(argv) else "the same command continues"


def _check_word(word: str, following: str, elsewhere: Mapping[str, str]) -> None:
    """Refuse what is no `key=value`, and what belongs to another door.

    Args:
        following: the next word, which may have been meant as the value.
    """
    if word.startswith("-") and word not in ("-h", "--help"):
        name, _, value = word.lstrip("-").replace("-", "_").partition("=")
        value = value or ("true" if name in SWITCHES or not following or "=" in following else following)
        works = f"{name}={value}" if len(name) > 1 and (value != "true" or name in SWITCHES) else "dry_run=true"
        raise Refusal(f"{word} is no key=value, which all settings are, without dashes; for example {works}.")
    key = word.lstrip("+~").partition("=")[0]
    if other := elsewhere.get(key.partition(".")[0]):
        raise Refusal(f"{key} is decided elsewhere; for example python -m {other}{word}.")


def _opened(door: str, schema: type[T], work: Callable[[T], int], groups: Sequence[str], argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(help_text(door, schema, sys.modules[work.__module__].__doc__ or "", groups))
        return OK
    config = compose(door, schema, argv)
    _check_device(config.device)
    return work(config)


def _end(door: str, sentence: object, code: int) -> int:
    """The last sentence; returns the code. Of what all processes of a run have to say the first says it, and with its
    end torchrun ends them all; what one alone has to say it says, where it is not known once the first has had its
    time.
    """
    known = getattr(sentence, "shared", None if isinstance(sentence, Exception) else True)  # that all say it, or one
    alone = known is False and not isinstance(sentence, ProcessLost)
    if speaks(for_lost=isinstance(sentence, ProcessLost)):
        print(f"mutune.{door}: {sentence}", file=sys.stderr)
    elif alone:
        print(f"mutune.{door}, process {rank()}: {sentence}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENCE)
        if known is None:
            print(f"mutune.{door}, process {rank()}: {sentence}", file=sys.stderr)
    return code


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        require(torch.cuda.is_available(), "device=cuda was asked for but torch sees no GPU here; use device=cpu.")


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated
