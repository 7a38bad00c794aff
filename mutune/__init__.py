"""μP hyperparameter search, transfer and scaling. What a user's code needs is named here, and loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune import search as search
    from mutune.parametrization.apply import set_rates
    from mutune.parametrization.audit import audit
    from mutune.parametrization.finding import AuditError
    from mutune.parametrization.infer import Family, parametrize
    from mutune.parametrization.multiplier import Multiplier
    from mutune.parametrization.parametrized import Parametrized
    from mutune.parametrization.plan import Decay
    from mutune.parametrization.roles import Role
    from mutune.verification.check import coordinate_check

__all__ = [
    "AuditError",
    "Decay",
    "Family",
    "Multiplier",
    "Parametrized",
    "Role",
    "audit",
    "coordinate_check",
    "parametrize",
    "set_rates",
]

#: Public name → the module that has it.
PUBLIC = {
    "AuditError": "mutune.parametrization.finding",
    "Decay": "mutune.parametrization.plan",
    "Family": "mutune.parametrization.infer",
    "Multiplier": "mutune.parametrization.multiplier",
    "Parametrized": "mutune.parametrization.parametrized",
    "Role": "mutune.parametrization.roles",
    "audit": "mutune.parametrization.audit",
    "coordinate_check": "mutune.verification.check",
    "parametrize": "mutune.parametrization.infer",
    "set_rates": "mutune.parametrization.apply",
}
#: Rooms that a user reaches by name, for what their own fronts hand out.
ROOMS = ("search",)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import mutune` and every `--help` start without torch."""
    if name in ROOMS:
        return importlib.import_module(f"mutune.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module mutune has no attribute {name}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
