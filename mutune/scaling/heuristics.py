"""Rules of thumb about runs, with their sources. No torch.

Symbols: D tokens of a run, B tokens per step, N parameters, TPP = D/N. Figures are as reported; none was measured
here, and tiny runs lie outside every fit. Laws of D and B are in `horizon.py`.
"""

import math

#: Tensor Programs V (arXiv:2203.03466) §6.1: a proxy has at least this width and depth.
MIN_WIDTH, MIN_DEPTH = 256, 4

#: Steps of Cerebras-GPT's 40M proxy (modelzoo, params_gpt3_40M.yaml), the shortest known to have served a large target;
#: Tensor Programs V §6.1 asks for 5,000.
MIN_STEPS = 1525

#: Target tokens over proxy tokens of Tensor Programs V's GPT-3 (4B → 300B), the furthest transfer whose both are known.
FURTHEST_TOKENS = 75.0

#: TPP at which compute is spent best (arXiv:2203.15556), and at which Cerebras' proxies are tuned.
COMPUTE_OPTIMAL_TPP = 20.0

#: Critical batch B_crit = 93.2·N^0.47 sequences of 512 tokens, N in millions, at D = 20·N (arXiv:2410.21676). It
#: follows D and not N (the same; arXiv:2505.13738), so D/20 stands for N.
CRITICAL_EXPONENT = 0.47
CRITICAL_SCALE = 93.2 * 512 / (1e6 * COMPUTE_OPTIMAL_TPP) ** CRITICAL_EXPONENT


def critical_batch(tokens: float) -> float:
    """B_crit(D): tokens per step above which more of them save ever fewer steps."""
    return CRITICAL_SCALE * tokens**CRITICAL_EXPONENT


def tokens_at_critical_batch(num_steps: float) -> float:
    """D of a run of `num_steps` at its own critical batch: D = num_steps·B_crit(D)."""
    return (num_steps * CRITICAL_SCALE) ** (1.0 / (1.0 - CRITICAL_EXPONENT))


def steepest_alibi_slope(heads: int) -> float:
    """The largest of ALiBi's slopes (arXiv:2108.12409); the smallest is 2^-8 at every head count."""
    return 2.0 ** (-8.0 / 2 ** math.ceil(math.log2(heads)))
