"""FLOPs and bytes of BTLM-3B-8K and of its proxy, as vectors that can be checked by hand."""

import pytest

from mutune.model.shape import ModelConfig, tensor_specs
from mutune.scaling.arithmetic import (
    forward_flops_per_token,
    matmul_parameter_count,
    parameter_count,
    state_bytes,
    train_flops_per_token,
)

BTLM = ModelConfig(width=2560, depth=32, num_heads=32)
PROXY = ModelConfig(width=256, depth=32, num_heads=4)
VOCAB = 50257


def train_flops(shape: ModelConfig, context_length: int) -> int:
    return train_flops_per_token(
        matmul_parameter_count(tensor_specs(shape, VOCAB)),
        vocab_size=VOCAB,
        width=shape.width,
        depth=shape.depth,
        context_length=context_length,
    )


@pytest.mark.parametrize(
    ("context_length", "forward", "train"),
    [(2048, 5_961_241_600, 17_883_724_800), (8192, 7_974_507_520, 23_923_522_560)],
)
def test_flops_per_token_of_btlm_at_both_context_lengths(context_length: int, forward: int, train: int) -> None:
    flops = forward_flops_per_token(
        2_516_418_560, vocab_size=VOCAB, width=2560, depth=32, context_length=context_length
    )
    assert flops == forward
    assert train_flops(BTLM, context_length) == train


def test_attention_is_twelve_times_depth_width_and_context() -> None:
    assert train_flops(BTLM, 8192) - train_flops(BTLM, 0) == 12 * 32 * 2560 * 8192 == 8_053_063_680
    assert train_flops(BTLM, 2048) - train_flops(BTLM, 0) == 2_013_265_920


def test_the_whole_run_of_btlm_costs_its_two_stages() -> None:
    tokens = 119_727 * 3_932_160, 39_909 * 3_932_160
    assert tokens == (470_785_720_320, 156_928_573_440)
    total = tokens[0] * train_flops(BTLM, 2048) + tokens[1] * train_flops(BTLM, 8192)
    assert total == pytest.approx(1.21736865e22, rel=5e-9)


def test_two_hundred_proxy_runs_cost_half_a_percent_of_btlm() -> None:
    assert train_flops(PROXY, 2048) == 429_417_984
    tokens = 20 * parameter_count(tensor_specs(PROXY, VOCAB))
    assert tokens == 762_662_400
    per_run = tokens * train_flops(PROXY, 2048)
    assert per_run == pytest.approx(3.275e17, rel=1e-4)
    assert 200 * per_run == pytest.approx(6.55e19, rel=1e-4)
    assert 200 * per_run / 1.21736865e22 == pytest.approx(0.0054, rel=5e-3)


def test_flops_per_token_of_the_cerebras_proxy() -> None:
    shape = ModelConfig(width=256, depth=24, num_heads=4, ffn_width=1024, positions="learned", activation="gelu")
    assert train_flops(shape, 2048) == 341_435_904


def test_training_state_is_sixteen_bytes_per_parameter() -> None:
    assert state_bytes(2_646_255_744) == 42_340_091_904
