"""The theory as tables. A parametrization is data that a reader can hold against the paper; code only looks it up.

Symbols: m = fan_in / base fan_in of the tensor (vector-like tensors and the embedding table, whose fan-in is not a
width: their width / base width), L = number of blocks, d_head = head size, α = a tunable multiplier.
Exponents are of m, for Adam: init_std = σ·m^std, lr = η·m^lr, eps = ε·m^eps, weight decay = λ·m^wd.
"""

from dataclasses import dataclass, field

from mutune.errors import Refusal

NORMAL, TRUNCATED_NORMAL, ONES, ZEROS = "normal", "truncated_normal", "ones", "zeros"

#: Realised / nominal standard deviation of a normal truncated at ±2σ: sqrt(1 - 4·φ(2) / (2·Φ(2) - 1)).
TRUNCATED_STD_RATIO = 0.8796256610342398


@dataclass(frozen=True)
class Rule:
    """How one role scales with width. `per_depth`: the init std is also divided by sqrt(2L) (GPT-2's rule)."""

    init: str
    std: float = 0.0
    lr: float = 0.0
    eps: float = 0.0
    wd: float = 0.0
    decayed: bool = True
    per_depth: bool = False


@dataclass(frozen=True)
class Site:
    """One forward multiplier: α(hyperparameter)·m^width·d_head^head, or exactly 1 without a hyperparameter."""

    hyperparameter: str | None = None
    width: float = 0.0
    head: float = 0.0

    @property
    def formula(self) -> str:
        """The rule in words, as written into `multipliers.csv`."""
        symbols = {
            "embedding_multiplier": "α_emb",
            "output_multiplier": "α_out",
            "attention_multiplier": "α_attn",
        }
        text = symbols[self.hyperparameter] if self.hyperparameter else "1"
        text += {0.0: "", -1.0: " / m"}[self.width]
        return text + {0.0: "", -0.5: " / sqrt(d_head)", -1.0: " / d_head"}[self.head]


@dataclass(frozen=True)
class Table:
    """A parametrization: one rule per role, one multiplier per site, the ε it is meant for, and where it comes from."""

    name: str
    source: str
    adam_eps: float
    rules: dict[str, Rule]
    sites: dict[str, Site]
    transfers_over: tuple[str, ...] = field(default=())


_RESIDUAL = {"residual.attn": Site(), "residual.mlp": Site()}

# Standard parametrization: the base's σ and η at every width, attention 1/sqrt(d_head).
SP = Table(
    name="sp",
    source="standard practice; the SP column of arXiv:2505.01618 Table 1",
    adam_eps=1e-12,
    rules={
        "embedding": Rule(NORMAL),
        "position_embedding": Rule(NORMAL),
        "hidden": Rule(NORMAL),
        "residual_output": Rule(NORMAL),
        "gain": Rule(ONES, decayed=False),
        "bias": Rule(ZEROS, decayed=False),
    },
    sites={
        "embedding": Site("embedding_multiplier"),
        "attention_logits": Site("attention_multiplier", head=-0.5),
        **_RESIDUAL,
        "output": Site("output_multiplier"),
    },
)

# Maximal update parametrization, tied form with explicit multipliers.
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
        "hidden": Rule(NORMAL, -0.5, -1.0, -1.0, 1.0),
        "residual_output": Rule(NORMAL, -0.5, -1.0, -1.0, 1.0),
        "gain": Rule(ONES, 0.0, 0.0, -1.0, 0.0, decayed=False),
        "bias": Rule(ZEROS, 0.0, 0.0, -1.0, 0.0, decayed=False),
    },
    sites={
        "embedding": Site("embedding_multiplier"),
        "attention_logits": Site("attention_multiplier", head=-1.0),
        **_RESIDUAL,
        "output": Site("output_multiplier", width=-1.0),
    },
    transfers_over=("width",),
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
        "hidden": Rule(TRUNCATED_NORMAL, -0.5, -1.0),
        "residual_output": Rule(TRUNCATED_NORMAL, -0.5, -1.0, per_depth=True),
        "gain": Rule(ONES, decayed=False),
        "bias": Rule(ZEROS, decayed=False),
    },
    sites=MUP.sites,
    transfers_over=("width",),
)

TABLES = {table.name: table for table in (SP, MUP, BTLM)}


def get_table(name: str) -> Table:
    """The table of that name; a `Refusal` lists the known ones."""
    if name not in TABLES:
        raise Refusal(f"parametrization.table={name} is unknown; known tables: {', '.join(sorted(TABLES))}.")
    return TABLES[name]


@dataclass(frozen=True)
class ParametrizationConfig:
    """The table: `mup`, `btlm` or `sp`."""

    table: str = "mup"

    def __post_init__(self) -> None:
        get_table(self.table)
