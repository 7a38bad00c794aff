"""The memory of a process, as sums that can be checked by hand. Against torch: `tests/training/test_memory.py`."""

from dataclasses import replace

import pytest

from mutune.model.shape import ModelConfig, tensor_specs
from mutune.scaling.memory import (
    LOGIT_BYTES,
    LOGITS_AT_ONCE,
    UNFILLED,
    DecoderSize,
    ForwardPass,
    Memory,
    Sharding,
    decoder_size,
    moments_of_a_step,
    peak_memory,
)

TOY = DecoderSize(
    vocab_size=50,
    width=4,
    ffn_width=10,
    heads=2,
    depth=3,
    gated=True,
    bias_heads=2,
    block=100,
    block_matrices=80,
    root=200,
)
RUN = ForwardPass(sequences=2, context_length=8)
BTLM = ModelConfig(width=2560, depth=32, num_heads=32, ffn_width=6826)


def btlm() -> DecoderSize:
    return decoder_size(
        tensor_specs(BTLM, 50257), width=2560, ffn_width=6826, heads=32, depth=32, gated=True, alibi=True
    )


def at_loss(size: DecoderSize, run: ForwardPass, sharding: Sharding = Sharding()) -> Memory:  # noqa: B008
    return next(moments_of_a_step(size, run, sharding))


def test_the_size_of_btlm_has_all_its_parameters() -> None:
    size = btlm()
    assert size.parameters == 2_646_255_744
    assert size.table == 50257 * 2560
    assert size.root == size.table + 2 * 2560
    assert 32 * size.block_matrices == 2_516_418_560


def test_the_activations_of_a_toy_are_counted_tensor_by_tensor() -> None:
    # a token in a block, fp32: norm inputs and outputs 4·4, Q‖K‖V, scaled q and output 5·4, the feed-forward's 4·10: 76
    # numbers; mean and deviation of two norms, log-sum-exp of two heads: 6; outside: the last norm's input and output
    memory = at_loss(TOY, RUN)
    assert memory.activations == 4 * 16 * (3 * (76 + 6) + 2 * 4)
    assert memory.bias == 4 * 2 * 8**2
    assert memory.logits == LOGIT_BYTES * 16 * 50
    assert (memory.weights, memory.moments, memory.gradients) == (4 * 500, 8 * 500, 0)


def test_what_is_recomputed_is_not_kept() -> None:
    kept = {how: at_loss(TOY, replace(RUN, recomputed=how)).activations for how in ("none", "selective", "full")}
    assert kept["full"] == 4 * 16 * (3 * 4 + 2 * 4)  # the input of each block
    # the input; outputs of c_attn 3·4, of attention and the two c_proj 3·4, of c_fc and c_fc2 2·10; log-sum-exp
    assert kept["selective"] == 4 * 16 * (3 * (4 + 24 + 20 + 2) + 2 * 4)
    assert kept["full"] < kept["selective"] < kept["none"]


def test_explicit_attention_keeps_scores_and_flex_keeps_not_even_a_bias() -> None:
    explicit, fused = at_loss(TOY, replace(RUN, attention="explicit")), at_loss(TOY, RUN)
    scores = 4 * 16 * 3 * 2 * 8  # of 3 blocks, 2 heads, 8 keys
    assert explicit.activations - fused.activations == scores - 4 * 16 * 3 * (4 + 2)  # no Q‖K‖V whole, no log-sum-exp
    flex = at_loss(TOY, replace(RUN, attention="flex"))
    assert (flex.bias, flex.activations) == (0, fused.activations)


def test_the_bias_grows_with_the_context_squared_and_nothing_else_does() -> None:
    short, long = (at_loss(TOY, ForwardPass(64 // context, context)) for context in (8, 32))
    assert long.bias == 16 * short.bias
    assert long.activations == short.activations


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_memory_grows_with_every_sequence_so_that_the_largest_that_fits_can_be_halved_for(recomputed: str) -> None:
    for sharding in (Sharding(), Sharding(8), Sharding(8, reshard=False)):
        totals = [
            peak_memory(btlm(), ForwardPass(n, 2048, 2, "flex", recomputed, n < 64), sharding).total
            for n in range(1, 64)
        ]
        assert totals == sorted(set(totals))


def test_eight_shards_hold_an_eighth_of_the_state_and_two_replicas_of_four_a_quarter() -> None:
    run = ForwardPass(1, 2048, 2, "flex", "full", accumulates=True)
    alone, shards, replicas = (
        at_loss(btlm(), run, Sharding(processes, copies)).state for processes, copies in ((1, 1), (8, 1), (8, 2))
    )
    assert alone == 16 * 2_646_255_744
    assert shards == pytest.approx(alone / 8, rel=1e-6)
    assert replicas == 2 * shards


def test_blocks_that_stay_gathered_cost_their_weights() -> None:
    run, size = ForwardPass(1, 2048, 2, "flex"), btlm()
    kept, dropped = (list(moments_of_a_step(size, run, Sharding(8, reshard=reshard))) for reshard in (False, True))
    assert kept[0].gathered - dropped[0].gathered == 2 * 32 * size.block  # at the loss, none
    assert kept[1].gathered - dropped[1].gathered == 2 * 30 * size.block  # in a backward pass, two


def test_a_chunked_loss_never_holds_more_than_its_chunk() -> None:
    long = ForwardPass(4, 8192, 2, "flex")
    assert at_loss(btlm(), long).logits == LOGIT_BYTES * LOGITS_AT_ONCE["cpu"]
    assert at_loss(btlm(), replace(long, logits_at_once=None)).logits == LOGIT_BYTES * 4 * 8192 * 50257


def test_a_heap_that_keeps_what_is_freed_is_between_its_worst_moment_and_the_most_of_each_component() -> None:
    moments = list(moments_of_a_step(TOY, RUN, Sharding()))
    heap, worst = peak_memory(TOY, RUN, heap=True), peak_memory(TOY, RUN)
    assert heap.total > worst.total == max(moment.total for moment in moments)
    assert heap.logits == pytest.approx(worst.logits + UNFILLED * (moments[0].logits - worst.logits), abs=1)
    assert heap.gradients == pytest.approx(worst.gradients + UNFILLED * (4 * 500 - worst.gradients), abs=1)


def test_components_name_every_byte() -> None:
    memory = peak_memory(btlm(), ForwardPass(2, 2048, 2, "sdpa", accumulates=True), Sharding(8))
    assert sum(memory.components().values()) == memory.total
    assert all(count > 0 for count in memory.components().values())
