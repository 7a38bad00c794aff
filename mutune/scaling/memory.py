"""Memory of one process that trains a decoder, by component, at the moment of a step at which it holds most.

Arithmetic only: no torch, nothing allocated. What a block keeps for its backward pass is counted tensor by tensor from
the decoder's code; what a backward pass needs besides was taken from torch's memory tracker.

Letters: P parameters, N tokens of a forward pass, D width, F feed-forward width, H heads, T context, V vocabulary,
L blocks, c bytes of a number in products of matrices (4, or 2 under bfloat16 autocast; the residual stream,
LayerNorm and softmax stay float32).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

from mutune.parametrization.plan import TensorSpec

FP32 = 4
#: Kind of device → numbers: a chunked loss computes logits of so many tokens at a time.
LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**28}
UNFILLED = 0.6  # of a heap's holes, in bytes, stay unused: so that two runs of five models were met best
DIGIT = 256  # of a position: whole numbers below it, and their products with a power of it, are exact in bfloat16
COLUMNS = (
    3  # by which ALiBi makes queries and keys longer for each digit: bfloat16 numbers that add up to a float32 one
)
LOGIT_BYTES = 12  # of a logit at the worst moment: log-probabilities, their gradient and the logits' gradient, fp32


@dataclass(frozen=True)
class DecoderSize:
    """What of a decoder's shape decides its memory.

    Attributes:
        gated: whether the feed-forward is SwiGLU, with two matrices before its product.
        bias_heads: heads that have an attention bias of their own: H with ALiBi, else 1.
        block, block_matrices: parameters of one block, and those of its matrices.
        root: parameters outside blocks: the table, positions, the last norm, an untied head.
    """

    vocab_size: int
    width: int
    ffn_width: int
    heads: int
    depth: int
    gated: bool
    bias_heads: int
    block: int
    block_matrices: int
    root: int

    @property
    def parameters(self) -> int:
        """P, a tied table once."""
        return self.depth * self.block + self.root

    @property
    def table(self) -> int:
        """V·D."""
        return self.vocab_size * self.width


@dataclass(frozen=True)
class ForwardPass:
    """What a process computes at a time.

    Attributes:
        compute_bytes: c.
        attention: `flex` and `causal` keep no T² at all, `sdpa` a bias of T² per head, `explicit` scores of T² per head
            and sequence.
        recomputed: what the backward pass computes again, as `parallel.activation_checkpointing` has it.
        accumulates: whether gradients of earlier forward passes of the same step are there.
        logits_at_once: numbers of a chunk of logits, as `logits_at_once` has it; None computes them whole.
    """

    sequences: int
    context_length: int
    compute_bytes: int = FP32
    attention: str = "sdpa"
    recomputed: str = "none"
    accumulates: bool = False
    logits_at_once: int | None = LOGITS_AT_ONCE["cpu"]

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.context_length


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and moments are spread (FSDP2: one group per block, one for the rest).

    Attributes:
        processes: all of them; 1 is no FSDP.
        replicas: whole copies (HSDP); each is spread over processes / replicas.
        reshard: whether a block's gathered weights are dropped after its forward pass.
    """

    processes: int = 1
    replicas: int = 1
    reshard: bool = True

    @property
    def shards(self) -> int:
        """Parts of each copy."""
        return max(1, self.processes // self.replicas)


NOT_SHARDED = Sharding()


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. The metadata of a field says in words what it is.

    The first three are there all the time; the others are what is alive at one moment of a step.
    """

    weights: int = field(metadata={"is": "weights, fp32"})
    moments: int = field(metadata={"is": "Adam's moments, fp32"})
    gradients: int = field(metadata={"is": "gradients, fp32"})
    gathered: int = field(metadata={"is": "weights as products take them, gathered or cast"})
    reduced: int = field(metadata={"is": "gradients not yet added up or reduced"})
    activations: int = field(metadata={"is": "activations kept for the backward pass"})
    bias: int = field(metadata={"is": "attention bias"})
    working: int = field(metadata={"is": "one block's backward pass"})
    logits: int = field(metadata={"is": "logits and their gradients"})

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.components().values())

    @property
    def state(self) -> int:
        """Weights, gradients and moments."""
        return self.weights + self.gradients + self.moments

    def components(self) -> dict[str, int]:
        """In words → bytes, those that are not 0."""
        named = {part.metadata["is"]: getattr(self, part.name) for part in fields(self)}
        return {words: count for words, count in named.items() if count}


def logits_at_once(device: str) -> int:
    """Numbers of logits that exist at a time on that kind of device."""
    return LOGITS_AT_ONCE[device if device in LOGITS_AT_ONCE else "cpu"]


def decoder_size(
    specs: Sequence[TensorSpec], *, width: int, ffn_width: int, heads: int, depth: int, gated: bool, alibi: bool
) -> DecoderSize:
    """The sizes of a decoder with these tensors."""
    in_blocks = [spec for spec in specs if spec.in_block]
    return DecoderSize(
        vocab_size=specs[0].shape[0],
        width=width,
        ffn_width=ffn_width,
        heads=heads,
        depth=depth,
        gated=gated,
        bias_heads=heads if alibi else 1,
        block=sum(spec.size for spec in in_blocks) // depth,
        block_matrices=sum(spec.size for spec in in_blocks if len(spec.shape) == 2) // depth,
        root=sum(spec.size for spec in specs if not spec.in_block),
    )


def peak_memory(size: DecoderSize, run: ForwardPass, sharding: Sharding = NOT_SHARDED, *, heap: bool = False) -> Memory:
    """What a process holds at the worst moment of a step.

    Args:
        heap: whether memory comes from a heap that keeps what is freed, as glibc's on a CPU does. If every hole fitted
            what comes next it would hold what the worst moment holds, if none did the most of each component; measured
            (`benchmarks/target_memory.md`) it is between, and `UNFILLED` of the way is what is returned.
    """
    moments = list(moments_of_a_step(size, run, sharding))
    worst = max(moments, key=lambda memory: memory.total)
    if not heap:
        return worst
    most = {part.name: max(getattr(moment, part.name) for moment in moments) for part in fields(Memory)}
    held = {name: getattr(worst, name) for name in most}
    return Memory(**{name: held[name] + round(UNFILLED * (most[name] - held[name])) for name in most})


def moments_of_a_step(size: DecoderSize, run: ForwardPass, sharding: Sharding) -> Iterator[Memory]:
    """The moments one of which is the worst: the loss, the last blocks' backward passes, the table's."""
    state = FP32 * size.parameters // sharding.shards
    before = state if run.accumulates else 0
    whole = _Whole(size, run, sharding)

    def moment(blocks: int, *, gradients: int, gathered: int, reduced: int = 0, **rest: int) -> Memory:
        return Memory(
            weights=state,
            moments=2 * state,
            gradients=gradients,
            gathered=gathered,
            reduced=reduced,
            activations=run.tokens * (blocks * _stored(size, run) + rest.get("outside", 0)),
            bias=_bias(size, run),
            working=rest.get("working", 0),
            logits=rest.get("logits", 0),
        )

    last_norm = 2 * FP32 * size.width  # its input and its output
    logits = _logits(size, run)
    yield moment(
        size.depth,
        gradients=before,
        gathered=whole.at_loss,
        reduced=whole.table_gradient if logits < run.tokens * size.vocab_size else 0,  # of the chunks before
        outside=last_norm,
        logits=LOGIT_BYTES * logits,
    )
    for back in range(min(2, size.depth)):  # of the last block, and of the one before, while its gradients are reduced
        yield moment(
            size.depth - back,
            gradients=before,
            gathered=whole.in_blocks,
            reduced=whole.table_gradient + whole.block_gradients(back),
            working=run.tokens * _working(size, run),
        )
    yield moment(0, gradients=state, gathered=whole.at_table, reduced=whole.last_gradients)


@dataclass(frozen=True)
class _Whole:
    """Weights and gradients of whole tensors: gathered and unreduced ones under FSDP, casts and sums without it."""

    size: DecoderSize
    run: ForwardPass
    sharding: Sharding

    @property
    def _fsdp(self) -> bool:
        return self.sharding.processes > 1

    @property
    def _casts(self) -> int:
        """Bytes of a weight's copy for products, where autocast makes one."""
        return 0 if self.run.compute_bytes == FP32 else self.run.compute_bytes

    @property
    def at_loss(self) -> int:
        """The root's, gathered in fp32, are never dropped; casts of its table are there while the loss is computed."""
        size, c = self.size, self.run.compute_bytes
        if self._fsdp:
            kept = 0 if self.sharding.reshard else c * size.depth * size.block
            return FP32 * size.root + self._casts * size.table + kept
        return self._casts * (size.depth * size.block_matrices + size.table)

    @property
    def in_blocks(self) -> int:
        """One block's and the prefetched next one's; a graph that is not recomputed holds all copies."""
        size, c = self.size, self.run.compute_bytes
        if self._fsdp:
            return FP32 * size.root + c * (min(2, size.depth) if self.sharding.reshard else size.depth) * size.block
        blocks = size.depth if self.run.recomputed == "none" else 1
        return self._casts * blocks * size.block_matrices

    @property
    def at_table(self) -> int:
        return FP32 * self.size.root if self._fsdp else 0

    @property
    def table_gradient(self) -> int:
        """Of the output's product: it waits for the embedding's, whose table is the same."""
        return FP32 * self.size.table

    def block_gradients(self, back: int) -> int:
        """A block's own, and under FSDP the fp32 copy from which those of the block after it are being reduced."""
        if not self._fsdp:
            return 0 if self.run.accumulates else FP32 * self.size.block * (back + 1)
        return self.size.block * (self.run.compute_bytes + FP32 * back)

    @property
    def last_gradients(self) -> int:
        """The embedding's beside the output's, then the fp32 copy of the root's that is reduced."""
        if not self._fsdp:
            return FP32 * self.size.table * (2 if self.run.accumulates else 1)
        return 2 * FP32 * self.size.root


def _kept(size: DecoderSize, run: ForwardPass) -> int:
    """Bytes per token that a block's forward pass keeps, if nothing is computed again."""
    d, f, c = size.width, size.ffn_width, run.compute_bytes
    norms = 2 * (FP32 * d + 2 * FP32) + 2 * c * d  # input, mean and deviation; output, as products take it
    if size.gated and c != FP32:
        norms += c * d  # autocast casts the output once per product
    attention = c * 5 * d + FP32 * size.heads  # Q‖K‖V, q scaled, output; log-sum-exp
    if run.attention == "causal":  # longer q, k, v and output, and the output cut
        attention = c * (4 * _lengthened(size, run) + d) + FP32 * size.heads
    if run.attention == "explicit":
        per_score = FP32 if c == FP32 else FP32 + c  # softmax, and what the product with v takes of it
        attention = c * 4 * d + per_score * size.heads * run.context_length
    return norms + attention + c * f * (4 if size.gated else 2)


def _lengthened(size: DecoderSize, run: ForwardPass) -> int:
    """Numbers per token of queries that have ALiBi's columns too; one head alone counts as ALiBi's."""
    if size.bias_heads < size.heads:
        return size.width
    digits = next(number for number in range(1, 9) if DIGIT**number >= run.context_length)
    columns = 1 if run.compute_bytes == FP32 else COLUMNS * digits
    return size.heads * 8 * -(-(size.width // size.heads + columns) // 8)


def _stored(size: DecoderSize, run: ForwardPass) -> int:
    """Bytes per token and block between forward and backward pass."""
    d, f, c = size.width, size.ffn_width, run.compute_bytes
    if run.recomputed == "none":
        return _kept(size, run)
    if run.recomputed == "full":
        return FP32 * d
    scores = c * size.heads * run.context_length if run.attention == "explicit" else 0
    return FP32 * d + c * (6 * d + f * (2 if size.gated else 1)) + FP32 * size.heads + scores


def _working(size: DecoderSize, run: ForwardPass) -> int:
    """Bytes per token of a block's backward pass: what is computed again, and gradients of activations."""
    d, f, c = size.width, size.ffn_width, run.compute_bytes
    again = {
        "none": 0,
        "selective": _kept(size, run) - _stored(size, run) + 2 * c * d,  # outputs that no backward pass needs
        "full": _kept(size, run) - _stored(size, run),
    }[run.recomputed]
    stream = FP32 * d  # the gradient of the block's output
    feed_forward = c * f * (2 if size.gated else 1)
    if run.attention == "explicit":  # whose turn comes when the feed-forward's are gone
        scores = 2 * FP32 * size.heads * run.context_length - c * f * (4 if size.gated else 2)
        return again + stream + max(feed_forward, scores)
    return again + stream + feed_forward


def _logits(size: DecoderSize, run: ForwardPass) -> int:
    """Numbers of logits that exist at a time."""
    whole = run.tokens * size.vocab_size
    return whole if run.logits_at_once is None else min(whole, run.logits_at_once)


def _bias(size: DecoderSize, run: ForwardPass) -> int:
    """The bias, which the fused kernel takes in the number format of products; made once for all blocks."""
    if run.attention in ("flex", "causal"):
        return 0
    return (FP32 if run.attention == "explicit" else run.compute_bytes) * size.bias_heads * run.context_length**2
