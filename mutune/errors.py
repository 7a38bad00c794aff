"""The one exception that means *the user must change something*, and the one way to check a value's range."""

import math
from typing import Any

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
    at_least: float = -math.inf,
    at_most: float = math.inf,
    example: float,
) -> None:
    """Refuse `value` unless it is finite and within the bounds; `example` is a value that works."""
    ok = isinstance(value, (int, float)) and math.isfinite(value) and value > above and at_least <= value <= at_most
    if ok:
        return
    bounds = [f"above {above:g}"] if above != -math.inf else []
    bounds += [f"at least {at_least:g}"] if at_least != -math.inf else []
    bounds += [f"at most {at_most:g}"] if at_most != math.inf else []
    raise Refusal(f"{key}={value} must be a finite number {' and '.join(bounds)}; for example {key}={example:g}.")
