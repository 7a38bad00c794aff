"""μP hyperparameter search, transfer and scaling. What a user's code needs is named here, and loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune.parametrization.audit import audit
    from mutune.parametrization.finding import AuditError

__all__ = ["AuditError", "audit"]

#: Public name → the module that has it.
PUBLIC = {
    "AuditError": "mutune.parametrization.finding",
    "audit": "mutune.parametrization.audit",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import mutune` and every `--help` start without torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module mutune has no attribute {name}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
