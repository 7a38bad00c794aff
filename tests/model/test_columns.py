"""Attention by torch's causal kernels: ALiBi as columns of queries and keys. On a GPU too, where there is one."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutune.model.alibi import AlibiColumns, alibi_slopes, causal, causal_bias
from mutune.model.decoder import Decoder, FeedForward
from mutune.model.shape import ModelConfig
from mutune.scaling.memory import DecoderSize, ForwardPass, _lengthened
from mutune.training.config import LoopConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SITES = {"embedding": 3.7, "attention_logits": 0.21, "residual.attn": 0.6, "residual.mlp": 1.3, "output": 0.37}
CPU = torch.device("cpu")


@pytest.mark.parametrize("positions", ["alibi", "learned"])
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_by_columns_is_attention_by_biases(heads: int, positions: str) -> None:
    shape = ModelConfig(width=20 * heads, depth=2, num_heads=heads, positions=positions)
    torch.manual_seed(0)
    models = [Decoder(shape, 23, SITES, attention).to(torch.float64) for attention in ("explicit", "causal")]
    models[1].load_state_dict(models[0].state_dict())
    ids_BT = torch.randint(0, 23, (2, 41))
    losses = [model.loss(ids_BT[:, :-1], ids_BT[:, 1:]) for model in models]
    wanted, found = (torch.autograd.grad(losses[i], list(models[i].parameters())) for i in range(2))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=0)
    for expected, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("time", [1, 256, 257, 8192, 65536, 70000])
def test_columns_in_bfloat16_make_exactly_what_float32_would(time: int) -> None:
    slopes_H = alibi_slopes(12)  # of which half are no power of two
    columns = AlibiColumns.make(slopes_H, time, CPU, torch.bfloat16)
    made_HT = columns.queries_HC.double() @ columns.keys_TC.double().T
    wanted_HT = torch.tensor(slopes_H, dtype=torch.float64)[:, None] * torch.arange(time)
    torch.testing.assert_close(made_HT, wanted_HT, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize(("time", "columns"), [(200, 3), (257, 6), (8192, 6), (65537, 9)])
def test_memory_counts_as_many_columns_as_there_are(time: int, columns: int) -> None:
    made = AlibiColumns.make(alibi_slopes(32), time, CPU, torch.bfloat16)
    size = DecoderSize(100, 32 * 80, 6826, 32, 1, True, 32, 0, 0, 0)
    assert made.queries_HC.shape[1] == columns
    longer = _lengthened(size, ForwardPass(1, time, 2, "causal"))
    assert longer == 32 * (80 + -(-columns // 8) * 8)


def attention_of(name: str, parts: list[Tensor], slopes_H: list[float]) -> Tensor:
    q_BHTK, k_BHTK, v_BHTK = parts
    time, device, dtype = q_BHTK.shape[2], q_BHTK.device, q_BHTK.dtype
    if name == "causal":
        return causal(q_BHTK, k_BHTK, v_BHTK, AlibiColumns.make(slopes_H, time, device, dtype))
    bias_HTT = causal_bias(slopes_H, time, device=device, dtype=dtype)
    if name == "sdpa":
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=bias_HTT[None], scale=1.0)
    return (q_BHTK @ k_BHTK.transpose(-2, -1) + bias_HTT).softmax(-1) @ v_BHTK


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_columns_are_no_coarser_than_a_bias_also_at_a_long_context(device: str) -> None:
    slopes_H, generator = alibi_slopes(4), torch.Generator().manual_seed(3)
    shape = (1, 4, 2048, 80)  # BTLM's head size
    q, k, v, back = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4))
    q = q / 80**0.5

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        parts = [part.to(dtype, copy=True).requires_grad_() for part in (q, k, v)]
        out = attention_of(name, parts, slopes_H)
        return [out.detach(), *torch.autograd.grad(out, parts, back.to(dtype))]

    exact = results("explicit", torch.float64)
    errors = {
        name: [
            float((found.double() - wanted).norm() / wanted.norm())
            for found, wanted in zip(results(name, torch.bfloat16), exact, strict=True)
        ]
        for name in ("causal", "sdpa")
    }
    assert max(errors["causal"]) < 5e-3
    assert all(mine < 1.1 * theirs for mine, theirs in zip(errors["causal"], errors["sdpa"], strict=True)), errors


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_padded_feed_forward_is_the_feed_forward(activation: str) -> None:
    shape = ModelConfig(width=48, depth=1, num_heads=2, ffn_width=100, activation=activation)
    layer = FeedForward(shape).to(torch.float64)
    x_BTD = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    inputs = [x_BTD, *layer.parameters()]
    wanted, found = (torch.autograd.grad(made.square().sum(), inputs) for made in (layer(x_BTD), layer.padded(x_BTD)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert layer.padded(x_BTD).shape == (2, 5, 48)


@pytest.mark.parametrize(
    ("given", "device", "attention", "compiled"),
    [
        ({"dtype": "bfloat16"}, "cuda", "causal", True),
        ({"dtype": "bfloat16", "document_mask": True}, "cuda:1", "flex", True),
        ({"dtype": "float32"}, "cuda", "flex", True),
        ({"dtype": "bfloat16", "attention": "sdpa", "compile": False}, "cuda", "sdpa", False),
        ({"dtype": "bfloat16"}, "cpu", "sdpa", False),
        ({"attention": "causal", "compile": True}, "cpu", "causal", True),
    ],
)
def test_what_is_left_open_follows_the_device(
    given: dict[str, object], device: str, attention: str, compiled: bool
) -> None:
    loop = LoopConfig(**given)  # type: ignore[arg-type]
    assert (loop.attention_on(device), loop.compiled_on(device)) == (attention, compiled)


def test_columns_cannot_tell_documents_apart_and_say_so() -> None:
    with pytest.raises(ValueError, match=r"loop\.attention=causal cannot tell documents apart"):
        LoopConfig(attention="causal", document_mask=True)


# ---------------------------------------------------------------------------------------------------- compiled by parts
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Compiled by Dynamo and AOTAutograd, without a code generator; counts the graphs."""
    import functools

    import torch._dynamo as dynamo

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo.utils.counters["stats"]
    dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, of a block's input
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_blocks_are_compiled_once_for_all_and_train_as_those_that_are_not(
    recompute: str, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mutune.training.recompute import recomputed

    monkeypatch.setattr("mutune.model.decoder.logits_at_once", lambda device: 23 * 16)  # five chunks of 16
    shape = ModelConfig(width=32, depth=4, num_heads=2)
    torch.manual_seed(0)
    plain, parts = Decoder(shape, 23, SITES, "explicit"), Decoder(shape, 23, SITES, "causal", recomputed(recompute))
    parts.load_state_dict(plain.state_dict())
    parts.compile_parts()
    ids_BT = torch.randint(0, 23, (2, 41))
    losses = [model.loss(ids_BT[:, :-1], ids_BT[:, 1:]) for model in (plain, parts)]
    for loss in losses:
        loss.backward()
    assert counted["unique_graphs"] == 2, "one of a block, one of a chunk of the loss"
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for (name, expected), (_, found) in zip(plain.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(parts.loss(ids_BT[:, :-1], ids_BT[:, 1:]), losses[0].detach(), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_ten_shapes_of_a_batch_are_compiled_each_for_itself(counted: dict[str, int]) -> None:
    model = Decoder(ModelConfig(width=16, depth=1, num_heads=1), 23, SITES, "causal")
    model.compile_parts()
    for sequences in range(1, 11):
        ids_BT = torch.randint(0, 23, (sequences, 9))
        model.loss(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
    assert counted["unique_graphs"] == 2 * 10, "a block and a loss of each"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("attention", "end"), [("causal", None), ("flex", None), ("flex", 5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_s_attention_trains_as_the_one_written_out(attention: str, end: int | None, compiled: bool) -> None:
    shape = ModelConfig(width=320, depth=2, num_heads=4, ffn_width=854)
    torch.manual_seed(0)
    plain, other = (Decoder(shape, 1003, SITES, name, None, end).cuda() for name in ("explicit", attention))
    other.load_state_dict(plain.state_dict())
    if compiled:
        other.compile_parts()
    ids_BT = torch.randint(1003, (3, 513), device="cuda")
    for model, low in ((plain, False), (other, attention == "causal")):
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss = model.loss(ids_BT[:, :-1], ids_BT[:, 1:])
        loss.backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        error = float((found.grad - expected.grad).norm() / expected.grad.norm())
        assert error < (1e-1 if attention == "causal" else 1e-5), name
