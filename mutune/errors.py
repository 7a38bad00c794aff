"""The one exception that means *the user must change something*, and the one way to check a value's range."""

import math
from typing import Any


class Refusal(ValueError):
    """Input that cannot be used. The message is one sentence: the key, the value, and a value that would work.

    A door prints it on stderr and exits with code 2; nothing has been written by then.
    """


def require(condition: bool, message: str) -> None:
    """Raise `Refusal(message)` unless `condition` holds."""
    if not condition:
        raise Refusal(message)


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
