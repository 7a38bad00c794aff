"""What is checked, and on what: things that build a model at several sizes, and the text that they train on.

They are plain data, so that they can be sent to worker processes.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.prepare import TokenizedCorpus, prepare
from mutune.data.windows import Stage, WindowLoader, heldout_windows
from mutune.errors import Refusal, require
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig, base_config, base_shape, tensor_specs
from mutune.parametrization.apply import initialise
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.parametrized import Parametrized
from mutune.parametrization.plan import Decay, Plan, make_plan
from mutune.parametrization.rules import Table
from mutune.verification.coordinates import logits_of
from mutune.verification.verdict import WIDTH


@dataclass(frozen=True)
class DecoderSubject:
    """The house's decoder under one table, over width or depth.

    Attributes:
        axis: `width` or `depth`.
        model: the proxy, which is the base; other sizes are its family.
        table: the parametrization.
        hyperparameters: at the base.
        vocab_size: V.
        decay: how weight decay scales.
    """

    axis: str
    model: ModelConfig
    table: Table
    hyperparameters: BaseHyperparameters
    vocab_size: int
    decay: Decay = Decay()

    def shape(self, size: int) -> ModelConfig:
        """The model at one size."""
        return self.model.at_width(size) if self.axis == WIDTH else replace(self.model, depth=size)

    def plan(self, size: int) -> Plan:
        """The plan at one size."""
        shape = self.shape(size)
        return make_plan(
            self.table,
            tensor_specs(shape, self.vocab_size),
            base_shape(base_config(self.model), like=shape),
            self.hyperparameters,
            depth=shape.depth,
            head_size=shape.size_per_head,
            decay=self.decay,
        )

    def make(self, size: int, seed: int) -> tuple[nn.Module, Plan]:
        """The model at one size, initialised from `seed`, and its plan."""
        plan = self.plan(size)
        sites = {site: row.value for site, row in plan.multipliers.items()}
        model = Decoder(self.shape(size), self.vocab_size, sites)
        initialise(model, plan, seed)
        return model, plan


@dataclass(frozen=True)
class FamilySubject:
    """A user's own family under one table.

    Attributes:
        axis: what the sizes are, `width` or `depth`.
        family: `module:name` of a `mutune.Family`, or the family itself where no worker process is used.
        shapes: `module:name` of a function from size to the family's shape, or the function; None where the sizes are
            its shapes.
        table, hyperparameters, decay: as in `DecoderSubject`.
    """

    axis: str
    family: str | Family[Any]
    shapes: str | Callable[[int], Any] | None
    table: Table
    hyperparameters: BaseHyperparameters
    decay: Decay = Decay()

    def plan(self, size: int) -> Plan:
        """The plan at one size."""
        return self._at(size).plan

    def make(self, size: int, seed: int) -> tuple[nn.Module, Plan]:
        """The model at one size, initialised from `seed`, and its plan."""
        found = self._at(size)
        return found.build(seed), found.plan

    def _at(self, size: int) -> Parametrized:
        family = load_family(self.family) if isinstance(self.family, str) else self.family
        shapes = load("shapes", self.shapes, "examples.llama:at_depth") if isinstance(self.shapes, str) else self.shapes
        return family.at(size if shapes is None else shapes(size), self.table, self.hyperparameters, self.decay)


@functools.lru_cache(maxsize=4)
def load_family(name: str) -> Family[Any]:
    """The family called `module:name`.

    Raises:
        Refusal: no such module or name, or something that is no `mutune.Family`.
    """
    example = "examples.llama:family"
    found = load("family", name, example)
    require(
        isinstance(found, Family),
        f"family={name} is a {type(found).__name__}; it must be a mutune.Family, for example family={example}.",
    )
    return cast(Family[Any], found)


def load(key: str, name: str, example: str) -> Any:
    """What is called `module:name`.

    Raises:
        Refusal: there is no such module or name.
    """
    module, colon, attribute = name.partition(":")
    require(bool(colon and module and attribute), f"{key}={name} must be module:name; for example {key}={example}.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Refusal(f"{key}={name} cannot be loaded ({error}); for example {key}={example}.") from error


def check_runs(subject: "DecoderSubject | FamilySubject", size: int, ids_BT: Tensor) -> None:
    """Refuse a model that the text's tokens do not go through.

    Raises:
        Refusal: the forward pass raises; with what it says.
    """
    model, _ = subject.make(size, 0)
    try:
        with torch.no_grad():
            shape = tuple(logits_of(model(ids_BT)).shape)
    except (IndexError, RuntimeError, ValueError, TypeError) as error:
        said = str(error).split(chr(10))[0]
        raise Refusal(
            f"the model at size {size} does not take token ids below {int(ids_BT.max()) + 1} of shape "
            f"{tuple(ids_BT.shape)} ({type(error).__name__}: {said}); choose another tokenizer, for example "
            f"tokenizer=bytes, or mend the model."
        ) from error
    require(
        len(shape) == 3 and shape[:2] == tuple(ids_BT.shape) and shape[2] > int(ids_BT.max()),
        f"the model at size {size} gives logits of shape {shape} for token ids of shape {tuple(ids_BT.shape)}; it must "
        f"give (B, T, V) with V above {int(ids_BT.max())}, as a tensor, as .logits or first in a tuple.",
    )


@dataclass(frozen=True)
class Text:
    """A few steps on a corpus, and a fixed probe batch from its held-out part.

    Attributes:
        data, tokenizer: the corpus.
        context_length, batch_sequences: T and B of every step; the probe has as many.
        steps: steps after which coordinates are taken; the last one ends the run.
        betas: Adam's.
    """

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    context_length: int = 64
    batch_sequences: int = 8
    steps: tuple[int, ...] = (1, 2, 5, 10)
    betas: tuple[float, float] = (0.9, 0.95)

    def batch(self, seed: int, step: int) -> Tensor:
        """Token ids (B, T+1) of one step."""
        stage = Stage(self.context_length, self.steps[-1], self.batch_sequences)
        return torch.from_numpy(WindowLoader(self._corpus.train, [stage], seed).batch(step))

    @property
    def probe(self) -> Tensor:
        """Token ids (B, T) on which coordinates are taken."""
        windows = heldout_windows(self._corpus.heldout, self.context_length, self.batch_sequences)
        return torch.from_numpy(windows[:, :-1])

    @property
    def _corpus(self) -> TokenizedCorpus:
        key = repr((self.data, self.tokenizer))
        if key not in _CORPORA:
            _CORPORA[key] = prepare(self.data, self.tokenizer)
        return _CORPORA[key]


_CORPORA: dict[str, TokenizedCorpus] = {}
