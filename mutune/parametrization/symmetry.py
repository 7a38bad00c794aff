"""The abc-symmetry: which parametrizations are the same theory. No torch.

Write a weight as W = θ·W'. With Adam (ε not 0) and decoupled decay, training W' with every forward multiplier of W
times θ, initial std / θ, learning rate / θ, ε·θ and decay λ·θ gives the same function at every step
(arXiv:2203.03466 §B; ε and λ derived here). It is exact without gradient clipping, which sees other norms.
"""

from collections.abc import Mapping
from dataclasses import replace

from mutune.errors import require, require_number
from mutune.parametrization.plan import Plan, TensorPlan
from mutune.parametrization.rules import Rule, Table

#: The site that carries a role's θ.
SITE_OF = {"embedding": "embedding", "position_embedding": "embedding", "output": "output"}


def moved(table: Table, exponents: Mapping[str, float]) -> Table:
    """The same theory in another placement: W = θ·W' with θ = m^exponent for every tensor of the named roles.

    A group action: moving by s and then by t is moving by s + t. A table whose embedding and output come to rest in
    different placements no longer goes with a tied model, which has one tensor for both.

    Args:
        exponents: role → exponent. Roles that share a site move together.

    Raises:
        Refusal: a role without a site that could carry its θ, or one of two roles that share a site.
    """
    sites, rules = dict(table.sites), dict(table.rules)
    for role, t in exponents.items():
        require(role in SITE_OF, f"role {role} has no site that could carry its θ; those that do: {list(SITE_OF)}.")
        for other in [r for r, site in SITE_OF.items() if site == SITE_OF[role]]:
            require(
                exponents.get(other) == t,
                f"{role} and {other} share the site {SITE_OF[role]}; move both by the same exponent, for example "
                f"{{{role!r}: {t:g}, {other!r}: {t:g}}}.",
            )
        rules[role] = _moved_rule(rules[role], t)
    for site in {SITE_OF[role] for role in exponents}:
        t = next(t for role, t in exponents.items() if SITE_OF[role] == site)
        sites[site] = replace(sites[site], width=sites[site].width + t)
    together = exponents.get("embedding", 0.0) == exponents.get("output", 0.0)
    untied = table.untied if together else rules["embedding"] != rules["output"]
    return replace(table, rules=rules, sites=sites, untied=untied)


def moved_plan(plan: Plan, theta: Mapping[str, float]) -> Plan:
    """The same plan with W = θ·W' for each named tensor: its rate, ε, decay and initial std, and the site of its θ.

    The sites of embedding and output carry their θ. Every other tensor (a hidden matrix, a gain, a bias) needs its θ
    put into the forward pass by the caller, and a gain its initial value 1/θ.

    Args:
        theta: parameter name → θ. The embedding and the learned positions share a site, so they have the same θ.

    Raises:
        Refusal: a name that the plan does not have, a θ that is not above 0, or two of them at one site.
    """
    _check_thetas(plan, theta)
    rows = {name: _moved_row(row, theta.get(name, 1.0)) for name, row in plan.parameters.items()}
    sites = {
        name: replace(site, value=site.value * theta.get(site.tensor, 1.0), formula=f"{site.formula} · θ")
        if site.tensor in theta
        else site
        for name, site in plan.multipliers.items()
    }
    return replace(plan, parameters=rows, multipliers=sites)


def _check_thetas(plan: Plan, theta: Mapping[str, float]) -> None:
    for name, value in theta.items():
        require(name in plan.parameters, f"theta has {name}, which the plan does not; it has {list(plan.parameters)}.")
        require_number(f"theta[{name!r}]", value, above=0.0, example=2.0)
    for site in set(SITE_OF.values()):
        shared = [row.name for row in plan.parameters.values() if SITE_OF.get(row.role) == site]
        require(
            len({theta.get(name, 1.0) for name in shared}) <= 1,
            f"{' and '.join(shared)} share the site {site}; give them the same θ, for example "
            f"{dict.fromkeys(shared, 2.0)}.",
        )


def _moved_rule(rule: Rule, t: float) -> Rule:
    return replace(rule, std=rule.std - t, lr=rule.lr - t, eps=rule.eps + t, wd=rule.wd + t)


def _moved_row(row: TensorPlan, theta: float) -> TensorPlan:
    return replace(
        row,
        init_std=row.init_std / theta,
        init_std_realised=row.init_std_realised / theta,
        lr_mult=row.lr_mult / theta,
        peak_lr=row.peak_lr / theta,
        eps_mult=row.eps_mult * theta,
        adam_eps=row.adam_eps * theta,
        wd_mult=row.wd_mult * theta,
        weight_decay=row.weight_decay * theta,
    )
