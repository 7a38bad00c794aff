"""Probes: their numbers against ones computed another way, and that they leave no trace."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.training.moments import Fields, attentions
from mutune.training.probes import Probe
from tests.training.tiny import HYPER, tiny_batches, tiny_decoder, tiny_optimizer, tiny_plan, tiny_train

SHAPE = ModelConfig(width=48, depth=2, head_size=16)
IDS_BT = torch.from_numpy(tiny_batches()(999))


class Live:
    """A decoder in training, with its probe."""

    def __init__(self, num_steps: int = 10, *, decay: float = 0.0, tied: bool = True, clip: float = 1.0) -> None:
        hyper = replace(HYPER, weight_decay=decay)
        self.plan = tiny_plan(replace(SHAPE, tied=tied), hyperparameters=hyper)
        self.model = tiny_decoder(replace(SHAPE, tied=tied), self.plan)
        self.optimizer = tiny_optimizer(self.model, self.plan)
        self.probe, self.done, self.clip = Probe(self.model, self.optimizer, self.plan), 0, clip
        self.probe.remember()
        self.norms: list[float] = []
        self.train(num_steps)

    def train(self, num_steps: int) -> None:
        end = self.done + num_steps
        records = tiny_train(self.model, self.optimizer, end, start_step=self.done, clip_norm=self.clip)
        self.norms += [record["grad_norm"] for record in records]
        self.done = end

    def measure(self) -> Fields:
        return self.probe.measure(lambda: self.model.loss(IDS_BT[:, :-1], IDS_BT[:, 1:]))

    def weights(self, role: str) -> torch.Tensor:
        named = self.model.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if self.plan.parameters[name].role == role])


def number(fields: Fields, name: str) -> float:
    value = fields[name]
    assert isinstance(value, float)
    return value


# --------------------------------------------------------------------------------------------- weights and optimizer
@pytest.mark.parametrize("role", ["embedding", "hidden", "residual_output", "gain", "bias"])
def test_the_update_ratio_is_that_of_the_weights_before_and_after_an_update(role: str) -> None:
    live = Live()
    before = live.weights(role)
    live.train(1)
    after = live.weights(role)
    expected = ((after - before).norm() / after.norm()).item()
    assert number(live.measure(), f"update_ratio.{role}") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
def test_the_second_moment_is_the_average_of_squared_clipped_norms(clip: float) -> None:
    live = Live(12, clip=clip)
    expected = 0.0
    for norm in live.norms:
        expected = HYPER.beta2 * expected + (1 - HYPER.beta2) * min(norm, clip) ** 2
    assert number(live.measure(), "second_moment") == pytest.approx(expected, rel=1e-4)


def test_adam_accounts_for_how_far_weights_moved_and_for_no_more() -> None:
    live = Live(20, decay=0.1)
    assert 0.1 < number(live.measure(), "moved") < 1.5
    live.train(10)
    with torch.no_grad():
        live.model.get_parameter("h.1.attn.c_proj.weight").normal_(0.0, 0.5)
    fields = live.measure()
    assert number(fields, "moved") > 2.0
    assert fields["moved_tensor"] == "h.1.attn.c_proj.weight"
    live.train(10)
    assert number(live.measure(), "moved") < 1.5


def test_a_matrix_that_moved_four_times_as_far_as_its_updates_take_it_stands_out() -> None:
    live = Live(20)
    live.measure()
    weight = live.model.get_parameter("h.1.mlp.c_fc.weight")
    before = weight.detach().clone()
    live.train(10)
    with torch.no_grad():
        weight.add_(3.0 * (weight - before))
    fields = live.measure()
    assert fields["moved_tensor"] == "h.1.mlp.c_fc.weight"
    assert number(fields, "moved") > 2.0


def test_eps_above_the_gradients_shows_by_role_and_rare_tokens_do_not_count() -> None:
    live = Live()
    fields = live.measure()
    assert number(fields, "eps_share.hidden") < 0.01
    assert "eps_share.embedding" not in fields
    for group in live.optimizer.param_groups:
        group["eps"] = 1.0
    assert number(live.measure(), "eps_share.hidden") == 1.0


# -------------------------------------------------------------------------------------------------------- frozen heads
def freeze_head(live: Live) -> None:
    """No gradient for head 2 of the second block."""

    def without(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(3, 3, 16, 48)[:, 2] = 0.0
        return gradient

    live.model.get_parameter("h.1.attn.c_attn.weight").register_hook(without)


def test_a_head_without_a_gradient_is_frozen_at_the_next_probe_and_only_that_one() -> None:
    live = Live()
    assert "frozen" not in live.measure()
    freeze_head(live)
    live.train(10)
    assert live.measure()["frozen"] == "h.1.attn head 2"


def test_a_layer_all_of_whose_heads_lose_their_gradients_is_frozen_head_by_head() -> None:
    live = Live()
    live.measure()
    live.model.get_parameter("h.0.attn.c_attn.weight").register_hook(lambda gradient: 2e-3 * gradient)
    live.train(10)
    assert live.measure()["frozen"] == "h.0.attn head 0, h.0.attn head 1, h.0.attn head 2"


def test_a_tensor_that_adam_leaves_out_is_frozen() -> None:
    live = Live()
    live.measure()
    for _ in range(3):
        live.model.loss(IDS_BT[:, :-1], IDS_BT[:, 1:]).backward()
        live.model.get_parameter("h.0.mlp.c_fc.weight").grad = None
        live.optimizer.step()
        live.optimizer.zero_grad()
    assert live.measure()["frozen"] == "h.0.mlp.c_fc.weight"


def test_a_head_whose_values_do_not_depend_on_the_token_is_dead() -> None:
    live = Live()
    assert "dead_heads" not in live.measure()
    with torch.no_grad():
        live.model.get_parameter("h.0.attn.c_attn.weight").view(3, 3, 16, 48)[2, 1] = 0.0
    assert live.measure()["dead_heads"] == "h.0.attn head 1"


# -------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("tied", [True, False])
def test_output_logits_are_those_of_the_model(tied: bool) -> None:
    live = Live(tied=tied)
    with torch.no_grad():
        logits = live.model(IDS_BT[:, :-1])
    fields = live.measure()
    assert number(fields, "output_logit_max") == pytest.approx(logits.abs().max().item(), rel=1e-5)
    assert number(fields, "log_z") == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)


def test_attention_logits_are_queries_times_keys_times_the_multiplier() -> None:
    live = Live()
    inputs: list[torch.Tensor] = []
    layers = list(attentions(live.model).values())
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    with torch.no_grad():
        live.model(IDS_BT[:, :-1])
        for hook in hooks:
            hook.remove()
        highest = 0.0
        for layer, x_BTD in zip(layers, inputs, strict=True):
            qkv = layer.c_attn(x_BTD)
            for head in range(3):
                q, k = (qkv[..., part * 48 + 16 * head :][..., :16] for part in (0, 1))
                highest = max(highest, (q @ k.transpose(1, 2)).abs().max().item() / 16)
    assert number(live.measure(), "attention_logit_max") == pytest.approx(highest, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ number formats
def formats(fields: Fields) -> dict[str, float | str]:
    return {key.removeprefix("dtype."): value for key, value in fields.items() if key.startswith("dtype.")}


def test_number_formats_are_those_of_weights_gradients_moments_and_products() -> None:
    live = Live()
    usual: dict[str, float | str] = dict.fromkeys(("parameters", "optimizer", "products"), "float32")
    assert formats(live.measure()) == usual
    live.model.loss(IDS_BT[:, :-1], IDS_BT[:, 1:]).backward()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return live.model(IDS_BT)

    assert formats(live.probe.measure(forward)) == usual | {"gradients": "float32", "products": "bfloat16"}
    state = next(iter(live.optimizer.state.values()))
    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    assert formats(live.measure())["optimizer"] == "bfloat16/float32"


# ------------------------------------------------------------------------------------------------------------- no trace
def test_a_probe_changes_neither_weights_nor_gradients_nor_moments_nor_random_numbers() -> None:
    live = Live()
    live.model.loss(IDS_BT[:, :-1], IDS_BT[:, 1:]).backward()
    before = copy.deepcopy(everything(live))
    random = torch.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in live.model.modules()]

    def forward() -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return live.model(IDS_BT) + torch.rand(1)

    live.probe.measure(forward)
    torch.testing.assert_close(everything(live), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert live.model.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in live.model.modules()] == hooks


def everything(live: Live) -> list[list[torch.Tensor]]:
    """All tensors: weights, gradients, moments."""
    parameters: list[torch.Tensor] = list(live.model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [parameters, gradients, *([*live.optimizer.state[parameter].values()] for parameter in parameters)]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: torch.nn.ModuleDict({"module": model}), id="replicated"),  # as DDP names it
        pytest.param(lambda model: torch.compile(model, backend="eager"), id="compiled"),
    ],
)
def test_a_wrapped_model_has_the_fields_of_the_bare_one(wrap: Callable[[Decoder], torch.nn.Module]) -> None:
    live = Live(4)
    bare = live.measure()
    probe = Probe(wrap(live.model), live.optimizer, live.plan)
    found = probe.measure(lambda: live.model.loss(IDS_BT[:, :-1], IDS_BT[:, 1:]))
    moved = {"moved", "moved_tensor"}
    assert found == {name: value for name, value in bare.items() if name not in moved}


def test_before_the_first_update_there_is_nothing_of_adam() -> None:
    fields = Live(0).measure()
    assert {"second_moment", "moved", "frozen", "update_ratio.hidden"}.isdisjoint(fields)
    assert math.isfinite(number(fields, "output_logit_max"))
