"""The decoder's shape, without torch: widths, heads, switches, and the list of its tensors with one role each."""

from dataclasses import dataclass, replace

from mutune.errors import MAX_WHOLE, Refusal, require, require_number
from mutune.parametrization.plan import BaseShape, TensorSpec, base_of

POSITIONS = ("alibi", "learned")
ACTIVATIONS = ("swiglu", "gelu")
MAX_WIDTH, MAX_DEPTH = 2**20, 2**12  # far beyond any model; a plan of more tensors would only take time


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a BTLM decoder (Cerebras BTLM-3B-8K; GELU and learned positions give the Cerebras-GPT variants).

    Attributes:
        width: model width d.
        depth: number of blocks L.
        head_size: d_head; used when `num_heads` is None.
        num_heads: number of heads H; None takes width / head_size.
        ffn_width: feed-forward width f; None takes floor(8d/3).
        positions: `alibi` or `learned`.
        max_positions: length of the learned position table (unused with ALiBi).
        activation: `swiglu` or `gelu`.
        tied: whether the embedding table is the output matrix too, as in BTLM.
    """

    width: int = 32
    depth: int = 4
    head_size: int = 16
    num_heads: int | None = None
    ffn_width: int | None = None
    positions: str = "alibi"
    max_positions: int = 2048
    activation: str = "swiglu"
    tied: bool = True

    def __post_init__(self) -> None:
        bounds = (("width", MAX_WIDTH, 64), ("depth", MAX_DEPTH, 4), ("head_size", MAX_WIDTH, 16))
        for name, most, example in (*bounds, ("max_positions", MAX_WHOLE, 2048)):
            require_number(f"model.{name}", getattr(self, name), at_least=1, at_most=most, example=example, whole=True)
        for name, known in (("positions", POSITIONS), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            require(value in known, f"model.{name}={value} is unknown; known values: {', '.join(known)}.")
        if self.ffn_width is not None:
            require_number("model.ffn_width", self.ffn_width, at_least=1, example=8 * self.width // 3, whole=True)
        if self.num_heads is None:
            self._check_divides("head_size", self.head_size, self.width // self.head_size)
        else:
            require_number("model.num_heads", self.num_heads, at_least=1, example=max(1, self.width // 16), whole=True)
            self._check_divides("num_heads", self.num_heads, self.num_heads)

    def _check_divides(self, key: str, divisor: int, heads: int) -> None:
        if self.width % divisor == 0:
            return
        good = [n for n in range(1, self.width + 1) if self.width % n == 0]
        nearest = sorted(sorted(good, key=lambda n: abs(n - divisor))[:2])
        raise Refusal(
            f"model.{key}={divisor} does not divide model.width={self.width}; the nearest that do are "
            f"{' and '.join(f'model.{key}={n}' for n in nearest)}."
        )

    @property
    def heads(self) -> int:
        """Number of attention heads H."""
        return self.num_heads if self.num_heads is not None else self.width // self.head_size

    @property
    def size_per_head(self) -> int:
        """d_head = d / H."""
        return self.width // self.heads

    @property
    def ffn(self) -> int:
        """Feed-forward width f, by default floor(8d/3) as in BTLM (2560 → 6826)."""
        return self.ffn_width if self.ffn_width is not None else 8 * self.width // 3

    def at_width(self, width: int) -> "ModelConfig":
        """The same family at another width: head size, depth and switches kept, so that the head count grows.

        The feed-forward width follows its default rule, or where it was set, the width's ratio (rounded, at least 1).
        """
        if width == self.width:
            return self
        return replace(
            self, width=width, head_size=self.size_per_head, num_heads=None, ffn_width=self.ffn_width_at(width)
        )

    def ffn_width_at(self, width: int) -> int | None:
        """`ffn_width` of this family at another width."""
        return None if self.ffn_width is None else max(1, round(self.ffn_width * width / self.width))


@dataclass(frozen=True)
class BaseConfig:
    """The shape at which base hyperparameters live.

    Built from a proxy, it has the proxy's integer sizes. It may also be declared with real-valued ones: BTLM's
    configuration has `mup_base_hidden_size: 256` and `mup_base_filter_size: 682.6`, so that both ratios of its
    2,560-wide model are exactly 10.

    Attributes:
        width: d.
        depth: L.
        ffn_width: f; None takes floor(8d/3).
    """

    width: float = 32
    depth: int = 4
    ffn_width: float | None = None

    def __post_init__(self) -> None:
        require_number("base.width", self.width, at_least=1, example=256)
        require_number("base.depth", self.depth, at_least=1, example=4)
        if self.ffn_width is not None:
            require_number("base.ffn_width", self.ffn_width, at_least=1, example=682.6)

    @property
    def ffn(self) -> float:
        """Feed-forward width f."""
        return self.ffn_width if self.ffn_width is not None else 8 * self.width // 3


def base_config(shape: ModelConfig) -> BaseConfig:
    """The base that is built from a proxy's shape."""
    return BaseConfig(shape.width, shape.depth, shape.ffn)


def tensor_specs(shape: ModelConfig, vocab_size: int) -> list[TensorSpec]:
    """Every distinct trainable tensor, in the order of `Decoder.named_parameters()`; the tied table once."""
    return _specs(shape.width, shape.ffn, shape.depth, shape, vocab_size)


def base_shape(base: BaseConfig, like: ModelConfig) -> BaseShape:
    """The fan-ins at the base, for a model with the switches of `like`."""
    return base_of(_specs(base.width, base.ffn, 1, like, vocab_size=1), depth=base.depth)


def _specs(d: float, f: float, depth: int, switches: ModelConfig, vocab_size: int) -> list[TensorSpec]:
    table_sites = ("embedding", "output") if switches.tied else ("embedding",)
    specs = [TensorSpec("wte.weight", "embedding", (vocab_size, int(d)), d, sites=table_sites)]
    if switches.positions == "learned":
        shape = (switches.max_positions, int(d))
        specs.append(TensorSpec("wpe.weight", "position_embedding", shape, d, sites=("embedding",)))
    for i in range(depth):
        specs += _block_specs(f"h.{i}", d, f, switches.activation)
    specs += _norm_specs("ln_f", d, in_block=False)
    if not switches.tied:
        specs.append(TensorSpec("lm_head.weight", "output", (vocab_size, int(d)), d, sites=("output",)))
    return specs


def _block_specs(block: str, d: float, f: float, activation: str) -> list[TensorSpec]:
    specs = _norm_specs(f"{block}.ln_1", d)
    specs += _linear_specs(f"{block}.attn.c_attn", "hidden", 3 * d, d, "attention_logits")
    specs += _linear_specs(f"{block}.attn.c_proj", "residual_output", d, d, "residual.attn")
    specs += _norm_specs(f"{block}.ln_2", d)
    specs += _linear_specs(f"{block}.mlp.c_fc", "hidden", f, d)
    if activation == "swiglu":
        specs += _linear_specs(f"{block}.mlp.c_fc2", "hidden", f, d)
    return specs + _linear_specs(f"{block}.mlp.c_proj", "residual_output", d, f, "residual.mlp")


def _norm_specs(name: str, d: float, in_block: bool = True) -> list[TensorSpec]:
    return [
        TensorSpec(f"{name}.weight", "gain", (int(d),), d, in_block),
        TensorSpec(f"{name}.bias", "bias", (int(d),), d, in_block),
    ]


def _linear_specs(name: str, role: str, fan_out: float, fan_in: float, *sites: str) -> list[TensorSpec]:
    return [
        TensorSpec(f"{name}.weight", role, (int(fan_out), int(fan_in)), fan_in, in_block=True, sites=sites),
        TensorSpec(f"{name}.bias", "bias", (int(fan_out),), fan_out, in_block=True),
    ]
