"""The one exception that means *the user must change something*, and the one way to check a value's range."""

import math
from typing import Any

MAX_WHOLE = 10**15  # of anything counted; beyond it, arithmetic in floats is no longer exact
MAX_SHOWN = 100
MAX_NAME = 100  # bytes; two of them and a separator fit into the 255 of a file system


class Refusal(ValueError):
    """Input that cannot be used. The message is one sentence: the key, the value, and a value that would work.

    A door prints it on stderr and exits with code 2; nothing has been written by then.
    """


def require(condition: bool, message: str) -> None:
    """Raise `Refusal(message)` unless `condition` holds."""
    if not condition:
        raise Refusal(message)


def require_name(key: str, name: str) -> None:
    """Refuse a `name` that cannot be that of one folder."""
    plain = name.isprintable() and not set(name) & {"/", "\\"} and not name.startswith(".")
    if not plain or not 0 < len(name.encode(errors="replace")) <= MAX_NAME:
        shown = (name if name.isprintable() else ascii(name))[:MAX_NAME]
        raise Refusal(
            f"{key}={shown} must be a plain folder name of at most {MAX_NAME} bytes; for example {key}=small."
        )


def require_number(
    key: str,
    value: Any,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    example: float,
    whole: bool = False,
) -> None:
    """Refuse `value` unless it is a finite number within the bounds; `example` is a value that works.

    Args:
        whole: whether it counts something: an int, at most `MAX_WHOLE`.
    """
    if whole and isinstance(value, int) and value > MAX_WHOLE:
        at_most = min(at_most, MAX_WHOLE)  # a bound that only those need to hear of
    if _is_number(value, whole) and above < value < below and at_least <= value <= at_most:
        return
    bounds = (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
    words = " and ".join(f"{word} {_written(bound)}" for word, bound in bounds if math.isfinite(bound))
    kind = "a whole number" if whole else "a finite number"
    said = shown(repr(value) if isinstance(value, str) else value)
    raise Refusal(f"{key}={said} must be {kind} {words}; for example {key}={_written(example)}.")


def shown(value: Any) -> str:
    """A user's value in a message: `null` for None, and not longer than a line."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:  # Python itself does not print thousands of digits
        return f"a number of more than {MAX_SHOWN} digits"
    text = "null" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def first_line(error: BaseException) -> str:
    """What went wrong, without what follows it: the first line of an exception, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))


def _written(number: float) -> str:
    """A bound or an example in full: `2147483647`, `0.0085`."""
    return str(int(number)) if float(number).is_integer() else repr(number)
