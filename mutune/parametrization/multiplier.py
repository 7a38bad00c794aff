"""A forward multiplier as a module: a plain float that a hook can watch, and that no copy, shard or compile loses."""

from torch import Tensor, nn

from mutune.errors import require


class Multiplier(nn.Module):
    """Multiplies by one number of a plan. Put it where the site is; `apply.set_multipliers` gives it its value.

    Args:
        site: the site's name, as in a plan's `multipliers` (`embedding`, `attention_logits`, `output`, ...).
        value: the number.
    """

    def __init__(self, site: str, value: float = 1.0) -> None:
        require(isinstance(site, str), f"Multiplier({site!r}) must name its site; for example Multiplier('output').")
        super().__init__()
        self.site = site
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """x · value, of any shape."""
        return x if self.value == 1.0 else x * self.value

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.site}, {self.value:g}"
