"""What the decoder does so that a large run fits: logits in chunks, attention by rule, activations computed again."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mutune.compose import compose
from mutune.config import TransferConfig
from mutune.model import decoder
from mutune.model.alibi import alibi_slopes, causal_bias
from mutune.model.decoder import Block, Decoder
from mutune.model.shape import ModelConfig
from mutune.scaling.memory import logits_at_once
from mutune.training.recompute import recomputed

SITES = {"embedding": 3.7, "attention_logits": 0.21, "residual.attn": 0.6, "residual.mlp": 1.3, "output": 0.37}
VOCAB = 23


def built(shape: ModelConfig, attention: str = "sdpa", recompute: str = "none", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(shape, VOCAB, SITES, attention, recomputed(recompute)).to(torch.float64)


def loss_and_gradients(model: Decoder, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model.loss(ids_BT[:, :-1], ids_BT[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ids(sequences: int, time: int) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, time + 1), generator=torch.Generator().manual_seed(1))


class Largest(TorchDispatchMode):
    """Notes the most rows of `VOCAB` columns that any operation makes, but for the table's own 16."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dim() == 2 and made.shape[1] == VOCAB and made.shape[0] != 16:
            self.rows = max(self.rows, made.shape[0])
        return made


# --------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 7, 64])
def test_a_loss_in_chunks_is_the_whole_one_and_so_are_its_gradients(
    tokens: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, batch_BT = ModelConfig(width=16, depth=1, num_heads=2, tied=tied), ids(3, 7)
    whole, gradients = loss_and_gradients(built(shape), batch_BT)
    monkeypatch.setattr(decoder, "logits_at_once", lambda device: tokens * VOCAB)
    chunked, same = loss_and_gradients(built(shape), batch_BT)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("tokens", "expected"), [(5, 3), (7, 7), (64, 21)])
def test_no_more_logits_than_that_ever_exist(tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "logits_at_once", lambda device: tokens * VOCAB)
    model = built(ModelConfig(width=16, depth=1, num_heads=2))
    with Largest() as largest:
        loss_and_gradients(model, ids(3, 7))
    assert largest.rows == expected


def test_in_chunks_each_product_with_the_table_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, products = built(ModelConfig(width=16, depth=1, num_heads=2)), list[torch.Size]()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default and any(VOCAB in part.shape for part in args):
                products.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(decoder, "logits_at_once", lambda device: 7 * VOCAB)
    with Products():
        loss_and_gradients(model, ids(3, 7))
    assert len(products) == 3 * 3, "logits, and the gradients of states and table, of three chunks"


def test_gradients_of_gradients_of_a_loss_in_chunks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "logits_at_once", lambda device: 7 * VOCAB)
    model, batch_BT = built(ModelConfig(width=16, depth=1, num_heads=2), "explicit"), ids(3, 7)
    loss = model.loss(batch_BT[:, :-1], batch_BT[:, 1:])
    with pytest.raises(RuntimeError, match="no gradients of its gradients"):
        torch.autograd.grad(loss, model.wte.weight, create_graph=True)


def test_btlm_s_longest_sequence_has_no_more_logits_at_once_than_a_gigabyte_holds() -> None:
    assert 4 * logits_at_once("cpu") <= 2**30 < 4 * 8192 * 50257


# ------------------------------------------------------------------------------------------------------------ attention
@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile"
)  # on a CPU it only shows what is meant
@pytest.mark.parametrize("positions", ["alibi", "learned"])
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_by_rule_is_attention_by_biases(heads: int, positions: str) -> None:
    shape = ModelConfig(width=16 * heads, depth=2, num_heads=heads, positions=positions)
    with torch.no_grad():
        wanted, found = (built(shape, attention).to(torch.float32)(ids(2, 40)) for attention in ("sdpa", "flex"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[:, 0], wanted[:, -1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "explicit", "flex"])
def test_with_a_document_mask_each_document_is_read_as_if_it_stood_alone(attention: str) -> None:
    shape, end = ModelConfig(width=32, depth=2, num_heads=2), 7
    torch.manual_seed(0)
    masked, plain = (Decoder(shape, VOCAB, SITES, attention, None, token) for token in (end, None))
    masked.load_state_dict(plain.state_dict())
    one, other, rest = torch.tensor([1, 2, 3, end]), torch.tensor([4, 5, end]), torch.tensor([9, 8, 6, 5, 1])
    with torch.no_grad():
        together = masked(torch.stack([torch.cat([one, other, rest]), torch.cat([rest, one, other])]))
        alone = [plain(document[None])[0] for document in (one, other, rest)]
        seen = plain(torch.cat([one, other, rest])[None])[0]
    torch.testing.assert_close(together[0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[4:], together[0, 4:], rtol=1e-3)
    torch.testing.assert_close(together[1, 9:], alone[1], rtol=1e-4, atol=1e-5)  # `rest` has no end, so `one` is of it


# ------------------------------------------------------------------------------------------------------ computed again
class Products(TorchDispatchMode):
    """Counts products of matrices, and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.attentions = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.products += name in ("aten.addmm.default", "aten.mm.default")
        self.attentions += name.startswith("aten._scaled_dot_product") and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "products", "attentions"), [("none", 0, 0), ("selective", 0, 0), ("full", 8, 2)])
def test_what_is_computed_again_is_what_was_asked_for(kind: str, products: int, attentions: int) -> None:
    shape, batch_BT = ModelConfig(width=16, depth=2, num_heads=2), ids(3, 7)
    plain, counted = Products(), Products()
    with plain:
        wanted, gradients = loss_and_gradients(built(shape), batch_BT)
    with counted:
        found, same = loss_and_gradients(built(shape, recompute=kind), batch_BT)
    assert torch.equal(found, wanted)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())
    more = counted.products - plain.products
    assert products <= more <= products + (2 if products else 0)  # the last product of a block need not be done again
    assert counted.attentions - plain.attentions == attentions


# ------------------------------------------------------------------------------------------------------ a block of BTLM
@pytest.fixture
def block() -> Iterator[Block]:
    """One of `btlm_3b`'s, at its size, with values of its scale."""
    shape = compose("transfer", TransferConfig, ["study=published", "target=btlm_3b"]).target.model
    torch.manual_seed(0)
    made = Block(shape, dict.fromkeys(SITES, 1.0) | {"attention_logits": 1 / 80}, "sdpa")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.trunc_normal_(parameter, 0.0, 0.0029 if "c_proj" in name else 0.023)
    yield made
    del made
    gc.collect()


def test_a_block_of_btlm_s_size_trains_in_bfloat16(block: Block) -> None:
    count = sum(parameter.numel() for parameter in block.parameters())
    assert 32 * count + 50257 * 2560 + 2 * 2560 == 2_646_255_744
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(1, 32, 2560, generator=generator)
    bias = causal_bias(alibi_slopes(32), 32, device=torch.device("cpu"), dtype=torch.float32)

    def gradients(low: bool) -> dict[str, Tensor]:
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out_BTD = block(x_BTD, bias)
        assert out_BTD.dtype == torch.float32  # the residual stream
        out_BTD.square().mean().backward()
        return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}

    exact, rounded = gradients(low=False), gradients(low=True)
    assert len(exact) == len(rounded) == 14
    for name, gradient in exact.items():
        if "c_attn.bias" in name:  # the key's bias moves no attention, so that its gradient is rounding alone
            gradient, rounded[name] = gradient[5120:], rounded[name][5120:]
        assert (rounded[name] - gradient).norm() < 0.03 * gradient.norm(), name
        assert gradient.norm() > 0, name
