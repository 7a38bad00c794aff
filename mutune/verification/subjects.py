"""What is checked, and on what: things that build a model at several sizes, and the text that they train on.

They are plain data, so that they can be sent to worker processes.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.prepare import TokenizedCorpus, prepare
from mutune.data.windows import Stage, WindowLoader, heldout_windows
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig, base_config, base_shape, tensor_specs
from mutune.parametrization.apply import initialise
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Plan, make_plan
from mutune.parametrization.rules import Table
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
    """

    axis: str
    model: ModelConfig
    table: Table
    hyperparameters: BaseHyperparameters
    vocab_size: int

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
        )

    def make(self, size: int, seed: int) -> tuple[nn.Module, Plan]:
        """The model at one size, initialised from `seed`, and its plan."""
        plan = self.plan(size)
        sites = {site: row.value for site, row in plan.multipliers.items()}
        model = Decoder(self.shape(size), self.vocab_size, sites)
        initialise(model, plan, seed)
        return model, plan


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
