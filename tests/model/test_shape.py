"""Shapes: counts that can be checked by hand, and what is refused."""

from typing import Any

import pytest

from mutune.errors import Refusal
from mutune.model.shape import BaseConfig, ModelConfig, base_config, tensor_specs
from mutune.scaling.arithmetic import matmul_parameter_count, parameter_count

BTLM_3B = ModelConfig(width=2560, depth=32, num_heads=32)


def cerebras_gpt(width: int, depth: int, ffn_width: int) -> ModelConfig:
    return ModelConfig(
        width=width, depth=depth, num_heads=1, ffn_width=ffn_width, positions="learned", activation="gelu"
    )


def btlm(width: int, depth: int, ffn_width: int) -> ModelConfig:
    return ModelConfig(width=width, depth=depth, num_heads=1, ffn_width=ffn_width)


# V·d + [n_pos·d] + L·(4d² + 4d + g·(d·f + f) + f·d + d + 4d) + 2d with V = 50257, g = 2 for SwiGLU and 1 for GELU
COUNTS = [
    pytest.param(BTLM_3B, 78_674_772, 2_646_255_744, 2_517_597_824, 2_516_418_560, id="btlm-3b"),
    pytest.param(cerebras_gpt(256, 24, 1024), 789_760, 32_344_832, 18_954_752, 18_874_368, id="cerebras-40m"),
    pytest.param(cerebras_gpt(768, 10, 3072), 7_087_872, 111_050_496, 70_880_256, 70_778_880, id="cerebras-111m"),
    pytest.param(cerebras_gpt(1088, 14, 4352), 14_219_072, 255_977_024, 199_069_184, 198_868_992, id="cerebras-256m"),
    pytest.param(cerebras_gpt(1536, 18, 6144), 28_331_520, 590_310_912, 509_970_432, 509_607_936, id="cerebras-590m"),
    pytest.param(
        cerebras_gpt(2048, 24, 8192), 50_358_272, 1_315_723_264, 1_208_602_624, 1_207_959_552, id="cerebras-1.3b"
    ),
    pytest.param(
        cerebras_gpt(2560, 32, 10240), 78_676_480, 2_651_553_280, 2_517_652_480, 2_516_582_400, id="cerebras-2.7b"
    ),
    pytest.param(btlm(128, 32, 341), 198_314, 12_779_200, 6_346_304, 6_287_360, id="128x32"),
    pytest.param(btlm(256, 24, 682), 789_588, 31_816_416, 18_950_624, 18_862_080, id="256x24"),
    pytest.param(btlm(256, 32, 682), 789_588, 38_133_120, 25_267_328, 25_149_440, id="256x32"),
    pytest.param(btlm(256, 32, 683), 790_358, 38_157_760, 25_291_968, 25_174_016, id="256x32-683"),
    pytest.param(btlm(512, 32, 1365), 3_152_554, 126_614_336, 100_882_752, 100_646_912, id="512x32"),
    pytest.param(btlm(768, 32, 2048), 7_088_896, 265_443_584, 226_846_208, 226_492_416, id="768x32"),
    pytest.param(btlm(1024, 32, 2730), 12_595_540, 454_522_496, 403_059_328, 402_587_648, id="1024x32"),
    pytest.param(btlm(1280, 32, 3413), 19_677_866, 694_023_232, 629_694_272, 629_104_640, id="1280x32"),
]


@pytest.mark.parametrize(("shape", "per_layer", "total", "non_embedding", "matmul"), COUNTS)
def test_parameter_counts_equal_the_formula(
    shape: ModelConfig, per_layer: int, total: int, non_embedding: int, matmul: int
) -> None:
    specs = tensor_specs(shape, vocab_size=50257)
    assert parameter_count(spec for spec in specs if spec.name.startswith("h.0.")) == per_layer
    assert parameter_count(specs) == total
    assert parameter_count(spec for spec in specs if "embedding" not in spec.role) == non_embedding
    assert matmul_parameter_count(specs) == matmul


def test_the_optimizer_groups_of_btlm_have_the_known_sizes() -> None:
    specs = tensor_specs(BTLM_3B, vocab_size=50257)
    assert parameter_count(spec for spec in specs if spec.role in ("hidden", "residual_output")) == 2_516_418_560
    assert parameter_count(spec for spec in specs if spec.role == "embedding") == 128_657_920
    assert parameter_count(spec for spec in specs if spec.role in ("gain", "bias")) == 1_179_264


@pytest.mark.parametrize(("width", "ffn"), [(2560, 6826), (5120, 13653), (7168, 19114), (1536, 4096), (32, 85)])
def test_the_feed_forward_width_is_eight_thirds_rounded_down(width: int, ffn: int) -> None:
    assert ModelConfig(width=width, num_heads=1).ffn == ffn


def test_head_count_and_head_size_follow_from_each_other() -> None:
    assert (BTLM_3B.heads, BTLM_3B.size_per_head) == (32, 80)
    assert (ModelConfig(width=96, head_size=32).heads, ModelConfig(width=96, head_size=32).size_per_head) == (3, 32)


def test_a_feed_forward_width_that_was_set_keeps_its_ratio_at_other_widths() -> None:
    wide = ModelConfig(width=32, ffn_width=100)
    assert wide.at_width(64).ffn == 200
    assert wide.at_width(16).ffn == 50
    assert ModelConfig(width=64, ffn_width=1).at_width(16).ffn == 1  # never nothing
    assert wide.at_width(32) is wide
    assert ModelConfig(width=32).at_width(64).ffn_width is None


@pytest.mark.parametrize("key", ["width", "depth", "num_heads"])
@pytest.mark.parametrize("value", [16.0, True, 10**400])
def test_a_size_is_a_whole_number_of_reasonable_length(key: str, value: Any) -> None:
    with pytest.raises(Refusal, match=rf"model\.{key}=.* must be a whole number at least 1"):
        ModelConfig(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("width", 1_000_000_001), ("depth", 100_000_000)])
def test_a_shape_beyond_any_model_is_refused_at_once(key: str, value: int) -> None:
    arguments: dict[str, Any] = {key: value}
    with pytest.raises(Refusal, match=rf"model\.{key}={value} must be .* at most \d+; for example"):
        ModelConfig(**arguments)


def test_a_ladder_keeps_the_head_size_and_grows_the_head_count() -> None:
    narrow = BTLM_3B.at_width(640)
    assert (narrow.width, narrow.heads, narrow.size_per_head, narrow.ffn, narrow.depth) == (640, 8, 80, 1706, 32)


def test_a_base_built_from_a_proxy_has_its_integer_sizes() -> None:
    assert base_config(ModelConfig(width=256, depth=32)) == BaseConfig(width=256, depth=32, ffn_width=682)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"width": 48, "num_heads": 5},
            r"model\.num_heads=5 does not divide model\.width=48; the nearest that do are "
            r"model\.num_heads=4 and model\.num_heads=6\.",
        ),
        (
            {"width": 40, "head_size": 16},
            r"model\.head_size=16 does not divide model\.width=40; the nearest that do are "
            r"model\.head_size=10 and model\.head_size=20\.",
        ),
        (
            {"width": 0},
            r"model\.width=0 must be a whole number at least 1 and at most \d+; .*width=64\.",
        ),
        (
            {"depth": -1},
            r"model\.depth=-1 must be a whole number at least 1 and at most 4096; .*depth=4\.",
        ),
        (
            {"head_size": 0},
            r"model\.head_size=0 must be a whole number at least 1 and at most \d+; .*head_size=16\.",
        ),
        ({"num_heads": 0}, r"model\.num_heads=0 must be a whole number at least 1; for example model\.num_heads=2\."),
        ({"ffn_width": 0}, r"model\.ffn_width=0 must be a whole number at least 1; for example model\.ffn_width=85\."),
        ({"positions": "rope"}, r"model\.positions=rope is unknown; known values: alibi, learned\."),
        ({"activation": "relu"}, r"model\.activation=relu is unknown; known values: swiglu, gelu\."),
        ({"max_positions": 0}, r"model\.max_positions=0 must be a whole number at least 1"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        ModelConfig(**arguments)


@pytest.mark.parametrize("key", ["width", "depth", "ffn_width"])
def test_a_base_without_size_is_refused(key: str) -> None:
    with pytest.raises(Refusal, match=rf"base\.{key}=0 must be a finite number at least 1"):
        BaseConfig(**{key: 0})
