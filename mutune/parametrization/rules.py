"""The theory as tables. A parametrization is data that a reader can hold against the paper; code only looks it up.

Symbols: m = fan_in / base fan_in of the tensor (vector-like tensors, the embedding table and a block's input weights,
whose fan-in is not a width: their width / base width), m_L = depth / base depth inside residual blocks and 1
elsewhere, L = number of blocks, d_head = head size, α = a tunable multiplier, θ = a constant of the abc-symmetry
(`symmetry.py`).
For Adam: init_std = σ·m^std, lr = η·m^lr·m_L^lr_depth, eps = ε·m^eps·m_L^eps_depth, weight decay = λ·m^wd.
"""

from dataclasses import dataclass, replace

from mutune.errors import Refusal, require, require_number

NORMAL, TRUNCATED_NORMAL, ONES, ZEROS = "normal", "truncated_normal", "ones", "zeros"

#: Realised / nominal standard deviation of a normal truncated at ±2σ: sqrt(1 - 4·φ(2) / (2·Φ(2) - 1)).
TRUNCATED_STD_RATIO = 0.8796256610342398


@dataclass(frozen=True)
class Rule:
    """How one role scales. `per_depth`: the init std is also divided by sqrt(2L), which is GPT-2's rule."""

    init: str
    std: float = 0.0
    lr: float = 0.0
    eps: float = 0.0
    wd: float = 0.0
    lr_depth: float = 0.0
    eps_depth: float = 0.0
    decayed: bool = True
    per_depth: bool = False


@dataclass(frozen=True)
class Site:
    """One forward multiplier: α(hyperparameter)·m^width·m_L^depth·d_head^head; α is 1 without a hyperparameter."""

    hyperparameter: str | None = None
    width: float = 0.0
    head: float = 0.0
    depth: float = 0.0

    @property
    def formula(self) -> str:
        """The rule in words, as written into `multipliers.csv`."""
        text = _ALPHAS[self.hyperparameter] if self.hyperparameter else "1"
        powers = (("m", self.width), ("d_head", self.head), ("m_L", self.depth))
        return text + "".join(_power(symbol, exponent) for symbol, exponent in powers if exponent)


_ALPHAS = {"embedding_multiplier": "α_emb", "output_multiplier": "α_out", "attention_multiplier": "α_attn"}


def _power(symbol: str, exponent: float) -> str:
    size = abs(exponent)
    factor = {1.0: symbol, 0.5: f"sqrt({symbol})"}.get(size, f"{symbol}^{size:g}")
    return f" {'/' if exponent < 0 else '·'} {factor}"


@dataclass(frozen=True)
class Table:
    """A parametrization.

    Attributes:
        name, source: what it is called and where it comes from.
        adam_eps: the ε it is meant for, at the base.
        rules: one rule per role.
        sites: one forward multiplier per site.
        transfers_over: what its rules are meant to transfer over.
        untied: whether it needs separate embedding and output matrices.
        optimizer: the family its rates are for.
    """

    name: str
    source: str
    adam_eps: float
    rules: dict[str, Rule]
    sites: dict[str, Site]
    transfers_over: tuple[str, ...] = ()
    untied: bool = False
    optimizer: str = "Adam"


# Standard parametrization: the base's σ and η at every width, attention 1/sqrt(d_head).
SP = Table(
    name="sp",
    source="standard practice; the SP column of arXiv:2505.01618 Table 1",
    adam_eps=1e-12,
    rules={
        "embedding": Rule(NORMAL),
        "position_embedding": Rule(NORMAL),
        "input": Rule(NORMAL),
        "hidden": Rule(NORMAL),
        "residual_output": Rule(NORMAL),
        "output": Rule(NORMAL),
        "gain": Rule(ONES, decayed=False),
        "bias": Rule(ZEROS, decayed=False),
    },
    sites={
        "embedding": Site("embedding_multiplier"),
        "attention_logits": Site("attention_multiplier", head=-0.5),
        "residual.attn": Site(),
        "residual.mlp": Site(),
        "output": Site("output_multiplier"),
    },
)

# SP with the embedding's rate raised by the width ratio, and nothing else of μP: a block's input weights stay as they
#   are. A tied table is the embedding's.
SP_EMBED = replace(
    SP,
    name="sp_embed",
    source="SP with the embedding rate × width: arXiv:2605.21486",
    rules={
        **SP.rules,
        "embedding": replace(SP.rules["embedding"], lr=1.0),
        "position_embedding": replace(SP.rules["position_embedding"], lr=1.0),
    },
)

# Maximal update parametrization with explicit multipliers: the placement of Table 8, which allows tying.
#   input: weights inside a block whose fan-in is no width, such as those of what conditions it: the embedding's rule
#   without its site. hidden: also a block's matrices with a fixed number of outputs (routers, gates). Table 3's output
#   has the same rate and starts at m^-1, so that its products would start at m^-1/2; here they start alike.
#   std, lr, multipliers: arXiv:2203.03466 Table 8 (Adam), attention §4; eps: every gradient shrinks as 1/m
#   (arXiv:2505.01618 Table 1); wd: lr·λ constant across width (as in mup's MuAdamW; arXiv:2405.13698).
MUP = Table(
    name="mup",
    source="arXiv:2203.03466 Table 8, Adam; eps and weight decay: arXiv:2505.01618 Table 1",
    adam_eps=1e-12,
    rules={
        #                               std   lr    eps   wd       exponents of m
        "embedding": Rule(NORMAL, 0.0, 0.0, -1.0, 0.0),
        "position_embedding": Rule(NORMAL, 0.0, 0.0, -1.0, 0.0),
        "input": Rule(NORMAL, 0.0, 0.0, -1.0, 0.0),
        "hidden": Rule(NORMAL, -0.5, -1.0, -1.0, 1.0),
        "residual_output": Rule(NORMAL, -0.5, -1.0, -1.0, 1.0),
        "output": Rule(NORMAL, 0.0, 0.0, -1.0, 0.0),
        "gain": Rule(ONES, 0.0, 0.0, -1.0, 0.0, decayed=False),
        "bias": Rule(ZEROS, 0.0, 0.0, -1.0, 0.0, decayed=False),
    },
    sites={
        "embedding": Site("embedding_multiplier"),
        "attention_logits": Site("attention_multiplier", head=-1.0),
        "residual.attn": Site(),
        "residual.mlp": Site(),
        "output": Site("output_multiplier", width=-1.0),
    },
    transfers_over=("width",),
)

# The same theory with the output's 1/m in its initial values and rate: θ = m on the output of Table 8.
#   arXiv:2203.03466 Table 3, Adam: output var 1/fan_in², multiplier 1, lr 1/fan_in; eps·θ and λ·θ by the symmetry.
MUP_TABLE3 = replace(
    MUP,
    name="mup_table3",
    source="arXiv:2203.03466 Table 3, Adam; eps and weight decay as in mup, moved by the abc-symmetry",
    rules={**MUP.rules, "output": Rule(NORMAL, -1.0, -1.0, 0.0, 1.0)},
    sites={**MUP.sites, "output": Site("output_multiplier")},
    untied=True,
)

# The same theory with multipliers that make both ends' initial variance 1/width: θ = √m on embedding and output.
#   arXiv:2203.03466 Table 9, Adam: input var 1/fan_out, multiplier √fan_out, lr 1/√fan_out; output var 1/fan_in,
#   multiplier 1/√fan_in, lr 1/√fan_in. Both ends have the same θ, so it allows tying as Table 8 does. Table 9 moves
#   biases, gains and every input weight, which would put a multiplier on each of them; inside blocks, and gains and
#   biases everywhere, they stay where Table 8 has them, which is the same theory.
MUP_TABLE9 = replace(
    MUP,
    name="mup_table9",
    source="arXiv:2203.03466 Table 9, Adam, gains, biases, block inputs as in Table 8; eps and decay as in mup, moved",
    rules={
        **MUP.rules,
        "embedding": Rule(NORMAL, -0.5, -0.5, -0.5, 0.5),
        "position_embedding": Rule(NORMAL, -0.5, -0.5, -0.5, 0.5),
        "output": Rule(NORMAL, -0.5, -0.5, -0.5, 0.5),
    },
    sites={
        **MUP.sites,
        "embedding": Site("embedding_multiplier", width=0.5),
        "output": Site("output_multiplier", width=-0.5),
    },
)

# The published rules of BTLM-3B-8K: μP with ε and λ left unscaled, normals truncated at ±2σ, and 1/sqrt(2L) on the
# matrices that write into the residual stream.
#   Cerebras modelzoo Release_2.0.2, configs/params_btlm_2p7b_{2k,8k}.yaml and convert_config_to_mup.py
BTLM = Table(
    name="btlm",
    source="Cerebras modelzoo Release_2.0.2: params_btlm_2p7b_2k.yaml, params_btlm_2p7b_8k.yaml",
    adam_eps=1e-8,
    rules={
        "embedding": Rule(TRUNCATED_NORMAL),
        "position_embedding": Rule(TRUNCATED_NORMAL),
        "input": Rule(TRUNCATED_NORMAL),
        "hidden": Rule(TRUNCATED_NORMAL, -0.5, -1.0),
        "residual_output": Rule(TRUNCATED_NORMAL, -0.5, -1.0, per_depth=True),
        "output": Rule(TRUNCATED_NORMAL),
        "gain": Rule(ONES, decayed=False),
        "bias": Rule(ZEROS, decayed=False),
    },
    sites=MUP.sites,
    transfers_over=("width",),
)


def completep(alpha: float = 1.0) -> Table:
    """CompleteP (arXiv:2505.01618 Table 1): μP whose residual branches are multiplied by m_L^-α, 1/2 <= α <= 1.

    Inside blocks the rate of every tensor, gains and biases too, gets m_L^(α-1), and ε gets m_L^-α; the embedding, the
    final norm and the output keep those of μP. It does not go with an initial 1/sqrt(2L), which is another depth rule.
    """
    inside = {
        role: replace(MUP.rules[role], lr_depth=alpha - 1.0, eps_depth=-alpha)
        for role in ("input", "hidden", "residual_output", "gain", "bias")  # ln_f is in no block, so its m_L is 1
    }
    return replace(
        MUP,
        name="completep",
        source="arXiv:2505.01618 Table 1",
        rules={**MUP.rules, **inside},
        sites={**MUP.sites, "residual.attn": Site(depth=-alpha), "residual.mlp": Site(depth=-alpha)},
        transfers_over=("width", "depth"),
    )


TABLES = {table.name: table for table in (SP, SP_EMBED, MUP, MUP_TABLE3, MUP_TABLE9, BTLM, completep())}

#: How weight decay follows a tensor's learning rate, over the table's own rule (`table`).
#:   fixed: λ. scaled: λ·lr_mult^-p, p = decay_exponent; p = 1 keeps lr·λ constant (arXiv:2405.13698), p = 1/2 is
#:   arXiv:2510.15262's for matrices. independent: `weight_decay` is what one step at the peak rate takes off,
#:   λ = weight_decay / lr. horizon: `decay_timescale` is τ, the moving average's timescale as a fraction of the
#:   run, λ = 1 / (τ·steps·lr) (arXiv:2405.13698, 2505.13738).
#: A decay that is not in proportion to 1/lr (`fixed`, `scaled` with p other than 1) differs between placements.
DECAYS = ("table", "fixed", "scaled", "independent", "horizon")


def get_table(name: str, depth_exponent: float = 1.0) -> Table:
    """The table of that name; a `Refusal` lists the known ones."""
    if name not in TABLES:
        raise Refusal(f"parametrization.table={name} is unknown; known tables: {', '.join(sorted(TABLES))}.")
    return completep(depth_exponent) if name == "completep" else TABLES[name]


@dataclass(frozen=True)
class ParametrizationConfig:
    """The theory of a run.

    Attributes:
        table: `mup`, `mup_table3`, `mup_table9`, `btlm`, `completep`, `sp` or `sp_embed`.
        depth_exponent: CompleteP's α, from 1/2 to 1; other tables do not have it.
        decay: how weight decay scales: `table` (the table's own rule), `fixed`, `scaled`, `independent` or `horizon`.
        decay_exponent: p of `decay=scaled`; 1 keeps learning rate × decay the same in every tensor.
    """

    table: str = "mup"
    depth_exponent: float = 1.0
    decay: str = "table"
    decay_exponent: float = 1.0

    def __post_init__(self) -> None:
        get_table(self.table)
        key = "parametrization.depth_exponent"
        require_number(key, self.depth_exponent, at_least=0.5, at_most=1.0, example=1.0)
        if self.table != "completep":
            require(
                self.depth_exponent == 1.0,
                f"{key}={self.depth_exponent} belongs to parametrization.table=completep; leave it out with "
                f"parametrization.table={self.table}.",
            )
        require(
            self.decay in DECAYS,
            f"parametrization.decay={self.decay} is unknown; known decays: {', '.join(DECAYS)}.",
        )
        require_number("parametrization.decay_exponent", self.decay_exponent, at_least=0.0, at_most=2.0, example=1.0)
        if self.decay != "scaled":
            require(
                self.decay_exponent == 1.0,
                f"parametrization.decay_exponent={self.decay_exponent} belongs to parametrization.decay=scaled; "
                f"set parametrization.decay=scaled or leave it out.",
            )

    def theory(self) -> Table:
        """The table that the configuration names."""
        return get_table(self.table, self.depth_exponent)
