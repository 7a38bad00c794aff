"""Where a theory's constants θ may sit: role by role as exponents of m, or tensor by tensor at random."""

from collections.abc import Mapping

from hypothesis import strategies as st

from mutune.model.shape import ModelConfig
from mutune.parametrization.plan import Plan
from tests.training.tiny import tiny_plan


def ends(embedding: float, output: float) -> dict[str, float]:
    """Exponents of θ for the two ends of the model; learned positions go with the embedding."""
    return {"embedding": embedding, "position_embedding": embedding, "output": output}


def thetas_of(plan: Plan, exponents: Mapping[str, float]) -> dict[str, float]:
    """θ = m^exponent of every tensor whose role has one, by name."""
    rows = plan.parameters.values()
    return {row.name: row.width_mult ** exponents[row.role] for row in rows if row.role in exponents}


@st.composite
def random_thetas(draw: st.DrawFn, shape: ModelConfig) -> dict[str, float]:
    """θ = 2^U(-6, 6) for every tensor of the shape; embedding and learned positions share theirs."""
    thetas = {name: 2.0 ** draw(st.floats(-6, 6)) for name in tiny_plan(shape).parameters}
    return thetas | {"wpe.weight": thetas["wte.weight"]} if "wpe.weight" in thetas else thetas
