"""Parameters and FLOPs of a decoder, as arithmetic. No torch, nothing allocated; memory is `memory.py`'s."""

from collections.abc import Iterable

from mutune.parametrization.plan import TensorSpec

BYTES_FP32 = 4
ADAM_STATE_COPIES = 4  # weight, gradient, first and second moment


def parameter_count(specs: Iterable[TensorSpec]) -> int:
    """Trainable parameters, a tied table once."""
    return sum(spec.size for spec in specs)


def matmul_parameter_count(specs: Iterable[TensorSpec]) -> int:
    """Parameters of the matrices inside the blocks: what multiplies every token, without the table."""
    return sum(spec.size for spec in specs if spec.in_block and len(spec.shape) == 2)


def forward_flops_per_token(
    matmul_parameters: int, *, vocab_size: int, width: int, depth: int, context_length: int
) -> int:
    """2·(matrices + V·d) for the products with weights, 4·L·d·T for QKᵀ and PV, without the causal saving."""
    return 2 * (matmul_parameters + vocab_size * width) + 4 * depth * width * context_length


def train_flops_per_token(
    matmul_parameters: int, *, vocab_size: int, width: int, depth: int, context_length: int
) -> int:
    """Forward and backward: three times the forward pass."""
    return 3 * forward_flops_per_token(
        matmul_parameters, vocab_size=vocab_size, width=width, depth=depth, context_length=context_length
    )


def state_bytes(parameters: int) -> int:
    """Weights, gradients and Adam's two moments in fp32."""
    return parameters * BYTES_FP32 * ADAM_STATE_COPIES
