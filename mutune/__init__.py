"""μP hyperparameter search, transfer and scaling; what a user's own code needs is here, loaded when asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune.parametrization.infer import Family, Parametrized, parametrize
    from mutune.parametrization.multiplier import Multiplier
    from mutune.parametrization.roles import Role

__all__ = ["Family", "Multiplier", "Parametrized", "Role", "parametrize"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import mutune` and every `--help` start without torch."""
    if name not in __all__:
        raise AttributeError(f"module mutune has no attribute {name}")
    from mutune.parametrization import infer, multiplier, roles

    return next(getattr(place, name) for place in (infer, multiplier, roles) if hasattr(place, name))
