"""The base hyperparameters: what a sweep searches, at the shape of the proxy."""

from dataclasses import asdict, dataclass, fields

from mutune.errors import require_number


@dataclass(frozen=True)
class BaseHyperparameters:
    """Hyperparameters at the base shape; a plan turns them into per-tensor values at any other shape.

    Attributes:
        learning_rate: peak Adam learning rate η at the base shape.
        init_std: nominal standard deviation σ of every matrix at the base shape.
        embedding_multiplier: α_emb, multiplies the embedding's output.
        output_multiplier: α_out, multiplies the logits (before the table's width rule).
        attention_multiplier: α_attn, multiplies the attention logits (before the table's head-size rule).
        weight_decay: λ of decoupled AdamW at the base shape; with `parametrization.decay=independent`, η·λ.
        beta1, beta2: Adam's moment decays.
        adam_eps: Adam's ε at the base shape; None takes the table's own value.
        decay_timescale: τ, the timescale of the weights' moving average as a fraction of the run; for
            `parametrization.decay=horizon`, which takes it in place of `weight_decay`.
    """

    learning_rate: float = 0.015625
    init_std: float = 0.08
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float | None = None
    decay_timescale: float | None = None

    def __post_init__(self) -> None:
        for name in POSITIVE:
            require_number(f"hyperparameters.{name}", getattr(self, name), above=0.0, example=EXAMPLES[name])
        require_number("hyperparameters.weight_decay", self.weight_decay, at_least=0.0, example=0.1)
        for name in ("beta1", "beta2"):
            require_number(f"hyperparameters.{name}", getattr(self, name), at_least=0.0, below=1.0, example=0.95)
        if self.adam_eps is not None:
            require_number("hyperparameters.adam_eps", self.adam_eps, above=0.0, example=1e-12)
        if self.decay_timescale is not None:
            require_number("hyperparameters.decay_timescale", self.decay_timescale, above=0.0, example=0.1)

    def as_dict(self) -> dict[str, float | None]:
        """Plain name → value."""
        return asdict(self)


POSITIVE = ("learning_rate", "init_std", "embedding_multiplier", "output_multiplier", "attention_multiplier")
EXAMPLES = {
    "learning_rate": 0.01,
    "init_std": 0.08,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
NAMES = tuple(field.name for field in fields(BaseHyperparameters))
