"""Hugging Face's own GPT-2 and Llama, unchanged: roles are inferred and sites are named modules."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.llama import LlamaShape, build
from mutune.errors import Refusal
from mutune.model.shape import ModelConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.names import trainable
from mutune.parametrization.opinion import mup_opinion
from tests.training.tiny import VOCAB, tiny_plan

transformers = pytest.importorskip("transformers")

HYPER = BaseHyperparameters(
    learning_rate=0.02, init_std=0.25, embedding_multiplier=2.0, output_multiplier=1.5, weight_decay=0.1
)


# ---------------------------------------------------------------------------------------------------------------- GPT-2
def gpt2(shape: ModelConfig) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=shape.width,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_positions=shape.max_positions,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def gpt2_shape(width: int, depth: int = 2) -> ModelConfig:
    return ModelConfig(
        width=width, depth=depth, head_size=16, ffn_width=4 * width, activation="gelu", positions="learned"
    )


#: The dropout's input is the sum of both embeddings.
GPT2_SITES = {
    "embedding": "transformer.drop",
    "residual.attn": "*.attn",
    "residual.mlp": "*.mlp",
    "output": "lm_head",
}
GPT2_ROLES = {"*.c_proj.weight": "residual_output", "transformer.wpe.weight": "position_embedding"}


def gpt2_family() -> Family[ModelConfig]:
    return Family(gpt2, gpt2_shape(32), gpt2_shape(64), roles=GPT2_ROLES, sites=GPT2_SITES, head_size=16)


@pytest.mark.parametrize("table", ["mup", "completep", "btlm", "sp"])
def test_the_plan_of_gpt2_is_that_of_the_house(table: str) -> None:
    shape = gpt2_shape(80, depth=3)
    ours, theirs = gpt2_family().plan(shape, table, HYPER), tiny_plan(shape, table, HYPER, base=gpt2_shape(32))
    rows = {name.removeprefix("transformer."): row for name, row in ours.parameters.items()}
    assert rows.keys() == theirs.parameters.keys()
    for name, row in theirs.parameters.items():
        for column in ("role", "fan_in", "depth_mult", "init", "init_std", "peak_lr", "weight_decay", "adam_eps"):
            assert getattr(rows[name], column) == getattr(row, column), (name, column)
    for site, value in ours.multipliers.items():
        assert value.value == theirs.multipliers[site].value
        assert value.tensor.removeprefix("transformer.") == theirs.multipliers[site].tensor


def test_the_fan_in_of_a_conv1d_is_its_first_dimension() -> None:
    row = gpt2_family().plan(gpt2_shape(64), "mup", HYPER).parameters["transformer.h.0.mlp.c_fc.weight"]
    assert (row.shape, row.fan_in) == ("64x256", 64)


def test_mup_agrees_on_gpt2() -> None:
    assert mup_opinion(gpt2_family(), gpt2_shape(96)) == []


def test_gpt2_multiplies_where_its_sites_are_named() -> None:
    result = gpt2_family().at(gpt2_shape(64, depth=4), "completep", HYPER)
    model: Any = result.build(seed=0)
    assert result.unplaced == ("attention_logits",)
    ids = torch.arange(12)[None]
    body = model.transformer
    with torch.no_grad():
        x = 2.0 * (body.wte(ids) + body.wpe.weight[:12])
        for block in body.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (-1, 16)).transpose(1, 2).chunk(3, dim=1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
            x = x + 0.5 * block.attn.c_proj(mixed)
            inner = block.mlp
            x = x + 0.5 * inner.c_proj(inner.act(inner.c_fc(block.ln_2(x))))
        wanted = 0.75 * body.ln_f(x) @ body.wte.weight.T
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_gpt2_without_a_named_output_is_refused() -> None:
    family = Family(gpt2, gpt2_shape(32), gpt2_shape(64), roles=GPT2_ROLES)
    with pytest.raises(Refusal, match=re.escape("table mup multiplies at site embedding by α_emb")):
        family.at(gpt2_shape(64), "mup", HYPER)
    with pytest.raises(Refusal, match=r"at site output by α_out / m.*sites={'output': 'lm_head'}, or, untied, take"):
        family.at(gpt2_shape(64))


def test_a_tied_table_is_not_the_module_that_makes_logits() -> None:
    sites = {**GPT2_SITES, "output": "transformer.wte"}
    result = Family(gpt2, gpt2_shape(32), gpt2_shape(64), roles=GPT2_ROLES, sites=sites).at(gpt2_shape(64))
    with pytest.raises(Refusal, match=r"transformer\.wte, named for site output, is an embedding"):
        result.build(seed=0)


# ---------------------------------------------------------------------------------------------------------------- Llama
def llama(shape: LlamaShape) -> nn.Module:
    """Hugging Face's, whose attention is told to scale by 1 since the plan's number is on the queries."""
    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.width // shape.head_size,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("self_attn").scaling = 1.0  # type: ignore[assignment]
    return model


LLAMA_SITES = {
    "embedding": "model.embed_tokens",
    "attention_logits": "*.q_proj",
    "residual.attn": "*.self_attn",
    "residual.mlp": "*.mlp",
    "output": "lm_head",
}
#: Hugging Face's names → the example's.
NAMES = {
    "model.embed_tokens": "embed",
    "lm_head": "head",
    "model.norm": "norm",
    "model.layers": "layers",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(4):
        ids = torch.randint(31, (4, 10), generator=torch.Generator().manual_seed(step))
        out = model(ids[:, :-1])
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("table", ["mup", "completep"])
def test_the_llama_of_hugging_face_trains_as_the_example_does(table: str, tied: bool) -> None:
    """The same plan by other names, multipliers by hooks against multipliers in the code, and the same losses."""
    base, delta, target = LlamaShape(32, tied=tied), LlamaShape(64, tied=tied), LlamaShape(80, depth=4, tied=tied)
    theirs = Family(llama, base, delta, sites=LLAMA_SITES, head_size=16).at(target, table, HYPER)
    ours = Family(build, base, delta, head_size=16).at(target, table, HYPER)
    their_model, our_model = theirs.build(seed=0), ours.build(seed=0)
    values = {renamed(name): parameter for name, parameter in trainable(their_model).items()}
    assert values.keys() == trainable(our_model).keys()
    with torch.no_grad():
        for name, parameter in trainable(our_model).items():
            parameter.copy_(values[name])
    for site, row in ours.plan.multipliers.items():
        assert row.value == theirs.plan.multipliers[site].value
        assert row.tensor == renamed(theirs.plan.multipliers[site].tensor)
    found = losses(their_model, theirs.optimizer(their_model))
    assert found == pytest.approx(losses(our_model, ours.optimizer(our_model)), rel=1e-4)


def test_the_buffers_of_a_llama_made_on_the_meta_device_are_left_to_the_caller() -> None:
    """`to_empty` leaves its rotary frequencies undefined; parameters are the plan's all the same."""
    result = Family(llama, LlamaShape(32), LlamaShape(64), sites=LLAMA_SITES, head_size=16).at(LlamaShape(48))
    with torch.device("meta"):
        model = result.make()
    model.to_empty(device="cpu")
    result.initialise(model, seed=0)
    reference = trainable(result.build(seed=0))
    assert all(torch.equal(parameter, reference[name]) for name, parameter in trainable(model).items())
