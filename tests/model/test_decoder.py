"""The decoder against a slow float64 reference, the published vectors, and the properties it must have."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from mutune.model.alibi import alibi_slopes, causal_bias
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig, tensor_specs
from tests.model import reference

PLAIN = {"embedding": 1.0, "attention_logits": 1 / 16, "residual.attn": 1.0, "residual.mlp": 1.0, "output": 1.0}
SCALED = {"embedding": 3.7, "attention_logits": 0.21, "residual.attn": 0.6, "residual.mlp": 1.3, "output": 0.37}
VOCAB = 23

bias = functools.partial(causal_bias, device=torch.device("cpu"), dtype=torch.float64)


def random_decoder(shape: ModelConfig, sites: dict[str, float], dtype: torch.dtype = torch.float64) -> Decoder:
    """Every parameter random, biases and gains too, so that each of them matters."""
    model = Decoder(shape, VOCAB, sites)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def random_ids(batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sites", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    "switches",
    [
        {"width": 32, "num_heads": 2},
        {"width": 21, "num_heads": 3},
        {"width": 15, "num_heads": 5, "ffn_width": 7},
        {"width": 24, "num_heads": 12, "ffn_width": 31},
        {"width": 9, "num_heads": 1, "positions": "learned"},
        {"width": 21, "num_heads": 3, "activation": "gelu", "ffn_width": 50},
        {"width": 16, "num_heads": 4, "activation": "gelu", "positions": "learned", "max_positions": 8},
    ],
    ids=lambda switches: "-".join(map(str, switches.values())),
)
def test_logits_and_loss_equal_the_slow_reference(switches: dict[str, Any], sites: dict[str, float]) -> None:
    shape = ModelConfig(depth=3, **switches)
    model = random_decoder(shape, sites)
    ids_BT, targets_BT = random_ids(2, 9)[:, :-1], random_ids(2, 9)[:, 1:]
    arrays = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    expected = [
        reference.logits(
            arrays,
            row,
            depth=shape.depth,
            heads=shape.heads,
            alibi=shape.positions == "alibi",
            swiglu=shape.activation == "swiglu",
            sites=sites,
        )
        for row in ids_BT.tolist()
    ]
    with torch.no_grad():
        np.testing.assert_allclose(model(ids_BT).numpy(), np.stack(expected), rtol=1e-10, atol=1e-10)
        wanted = np.mean([reference.loss(x, y) for x, y in zip(expected, targets_BT.tolist(), strict=True)])
        assert model.loss(ids_BT, targets_BT).item() == pytest.approx(wanted, rel=1e-10)


def test_btlm_3b_has_its_published_size_and_the_tensors_of_its_specs() -> None:
    shape = ModelConfig(width=2560, depth=32, num_heads=32)
    with torch.device("meta"):
        model = Decoder(shape, 50257, PLAIN)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == 2_646_255_744
    assert len(parameters) == 451
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("positions", ["alibi", "learned"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("ffn_width", [None, 50])
def test_specs_list_the_decoders_own_tensors_in_order(positions: str, activation: str, ffn_width: int | None) -> None:
    shape = ModelConfig(
        width=48, depth=3, positions=positions, activation=activation, ffn_width=ffn_width, max_positions=40
    )
    with torch.device("meta"):
        model = Decoder(shape, VOCAB, PLAIN)
    assert [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()] == [
        (spec.name, spec.shape) for spec in tensor_specs(shape, VOCAB)
    ]


def test_alibi_slopes_equal_the_published_ones() -> None:
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(2) == [2**-4, 2**-8]
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16) == pytest.approx([2 ** (-(i + 1) / 2) for i in range(16)], rel=1e-15)
    thirty_two = alibi_slopes(32)
    assert thirty_two == pytest.approx([2 ** (-(i + 1) / 4) for i in range(32)], rel=1e-15)
    assert thirty_two[0] == pytest.approx(0.8408964153, abs=5e-11)
    assert thirty_two[-1] == 0.00390625
    assert sum(thirty_two) == pytest.approx(5.264568142618076, rel=1e-15)


def test_alibi_slopes_of_other_head_counts_interleave_the_next_power_of_two() -> None:
    assert alibi_slopes(12)[:8] == alibi_slopes(8)
    assert alibi_slopes(12)[8:] == pytest.approx([0.7071067812, 0.3535533906, 0.1767766953, 0.0883883476], abs=5e-11)
    assert alibi_slopes(17) == [*alibi_slopes(16), pytest.approx(0.8408964153, abs=5e-11)]
    assert alibi_slopes(20)[:16] == alibi_slopes(16)
    assert alibi_slopes(20)[16:] == pytest.approx([0.8408964153, 0.5946035575, 0.4204482076, 0.2973017788], abs=5e-11)


def test_the_attention_bias_is_minus_slope_times_distance_and_hides_the_future() -> None:
    bias_HTT = bias(alibi_slopes(32), 8)
    assert bias_HTT.shape == (32, 8, 8)
    assert bias_HTT[0, 3, 1].item() == pytest.approx(-1.681792830507429, rel=1e-15)
    for query in range(8):
        assert torch.isneginf(bias_HTT[:, query, query + 1 :]).all()
        assert torch.isfinite(bias_HTT[:, query, : query + 1]).all()
        assert (bias_HTT[:, query, query] == 0).all()


def test_the_attention_bias_depends_on_the_distance_alone() -> None:
    bias_HTT = bias(alibi_slopes(12), 10)
    assert torch.equal(bias_HTT[:, 1:, 1:], bias_HTT[:, :-1, :-1])
    assert torch.equal(bias(alibi_slopes(12), 10)[:, :6, :6], bias(alibi_slopes(12), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_keep_exact_distances_in_low_precision(dtype: torch.dtype) -> None:
    exact_HTT = bias(alibi_slopes(4), 600)
    rounded_HTT = causal_bias(alibi_slopes(4), 600, device=torch.device("cpu"), dtype=dtype)
    assert rounded_HTT.dtype == dtype
    assert torch.equal(rounded_HTT, exact_HTT.to(dtype))


@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_later_tokens_do_not_change_earlier_logits(positions: str) -> None:
    model = random_decoder(ModelConfig(width=24, depth=2, num_heads=3, positions=positions), SCALED)
    ids_BT = random_ids(2, 12)
    changed_BT = ids_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amin(dim=1).max() > 1e-3  # and they do change their own


def test_later_tokens_do_not_change_earlier_logits_in_bfloat16_at_long_contexts() -> None:
    model = random_decoder(ModelConfig(width=8, depth=1, num_heads=1), SCALED, dtype=torch.bfloat16)
    ids_BT = random_ids(1, 600)
    changed_BT = ids_BT.clone()
    changed_BT[:, 513:] = (changed_BT[:, 513:] + 1) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(ids_BT)[:, :513], model(changed_BT)[:, :513])


def test_alibi_needs_no_position_to_tell_orders_apart_but_its_first_token_sees_itself_alone() -> None:
    model = random_decoder(ModelConfig(width=24, depth=2, num_heads=3), SCALED)
    with torch.no_grad():
        alone = model(torch.tensor([[5]]))
        swapped = model(torch.tensor([[5, 7, 9], [5, 9, 7]]))
        short, long = model(random_ids(1, 6)), model(torch.cat([random_ids(1, 6), random_ids(1, 4)], dim=1))
    torch.testing.assert_close(swapped[:, 0], alone[:, 0].expand(2, -1), rtol=0, atol=1e-12)
    assert (swapped[0, 1] - swapped[1, 1]).abs().max() > 1e-3
    torch.testing.assert_close(long[:, :6], short, rtol=0, atol=1e-12)  # the cached bias follows the context length


def test_the_readout_is_the_embedding_table() -> None:
    model = random_decoder(ModelConfig(width=24, depth=1, num_heads=3), SCALED)
    state = model.state_dict()
    assert not [name for name in state if "head" in name or "slope" in name or "bias_cache" in name]
    with torch.no_grad():
        model.wte.weight[22] = 0.0
        assert (model(random_ids(1, 5).clamp(max=21))[..., 22] == 0).all()


def test_the_output_multiplier_scales_the_logits() -> None:
    shape = ModelConfig(width=24, depth=1, num_heads=3)
    plain, halved = random_decoder(shape, SCALED), random_decoder(shape, {**SCALED, "output": SCALED["output"] / 2})
    with torch.no_grad():
        torch.testing.assert_close(halved(random_ids(1, 5)) * 2, plain(random_ids(1, 5)), rtol=1e-14, atol=0)


def test_a_context_beyond_the_learned_positions_is_refused() -> None:
    model = random_decoder(ModelConfig(width=16, depth=1, positions="learned", max_positions=4), PLAIN)
    with pytest.raises(ValueError, match=r"context 5 exceeds model\.max_positions=4"):
        model(random_ids(1, 5))


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32() -> None:
    model = random_decoder(ModelConfig(width=16, depth=1), PLAIN, dtype=torch.bfloat16)
    assert model.loss(random_ids(1, 5), random_ids(1, 5)).dtype == torch.float32
