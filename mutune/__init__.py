"""μP hyperparameter search, transfer and scaling; what a user's own code needs is here, loaded when asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune.parametrization.infer import Family, parametrize
    from mutune.parametrization.multiplier import Multiplier
    from mutune.parametrization.parametrized import Parametrized
    from mutune.parametrization.roles import Role

__all__ = ["Family", "Multiplier", "Parametrized", "Role", "parametrize"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import mutune` and every `--help` start without torch."""
    if name not in __all__:
        raise AttributeError(f"module mutune has no attribute {name}")
    from mutune.parametrization import infer, multiplier, parametrized, roles

    return next(getattr(m, name) for m in (infer, multiplier, parametrized, roles) if hasattr(m, name))
