"""A loss that falls as a power of size to a floor, and what is to be expected of it at another size. No torch.

L(s) = E + a·(s/s_1)^-α, where s_1 is the smallest size. The fit is the whole posterior over a grid of hypotheses, with
E and a integrated in closed form: nothing is searched, so that there is no start to depend on, and one fit takes a few
milliseconds. A hypothesis says which α, how far the slope wanders off the power law, how large the noise really is,
which rung (if any) is an outlier, and whether there is a floor. The priors are judgements, stated once, here;
`benchmarks/prediction.md` says how often the intervals hold.

Shapes: A exponents, W wanderings, S noise scales, H outliers (none, then each rung), n rungs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Array = npt.NDArray[np.float64]

#: α per doubling of the size, even in log α. Of width: parameters go as width², and 0.03-0.5 are reported for those.
EXPONENTS = np.geomspace(0.03, 2.0, 40)
#: Each stands for those around it: normal in log α, half a step wide, so that together they are even.
CELL = 0.5 * math.log(EXPONENTS[1] / EXPONENTS[0])
#: The slope's relative wandering per square root of a doubling (a Wiener process), with prior weights: model error.
WANDERINGS, WANDERING_WEIGHTS = np.array([0.0, 0.1, 0.2, 0.4]), np.array([0.7, 0.15, 0.1, 0.05])
#: The noise over its estimate; weighted by the estimate's degrees of freedom.
NOISE_SCALES = np.array([0.7, 1.1, 1.8])
#: At most one rung is off, by this standard deviation in units of its error; for each with this probability (for all
#: together at most one half).
OUTLIER, OUTLIER_PROBABILITY = 8.0, 0.03
SHARES = 15  # equal ones that a distribution is cut into, where another is added to it
NO_FLOOR_PROBABILITY = 0.2  # that E is exactly 0; else E is anywhere in [0, the lowest loss]


@dataclass(frozen=True)
class Forecast:
    """What a new run at one size will lose: a mixture of normal distributions, one for each hypothesis.

    Attributes:
        weights, means, deviations: of the mixture's parts.
        exponent: posterior mean of α.
        floor: posterior mean of E, in the unit of the losses.
    """

    weights: Array
    means: Array
    deviations: Array
    exponent: float
    floor: float

    def plus(self, above: Array, weights: Array, probability: float) -> float:
        """As `quantile`, of a run that loses more by one of the draws `above` with their weights; never below 0."""
        if not above.any():
            return max(0.0, self.quantile(probability))
        shares = (np.arange(SHARES) + 0.5) / SHARES
        values = np.quantile(above, shares, weights=weights, method="inverted_cdf")
        shifted = replace(
            self,
            weights=np.repeat(self.weights, SHARES) / SHARES,
            means=(self.means[:, None] + values).ravel(),
            deviations=np.repeat(self.deviations, SHARES),
        )
        return max(0.0, shifted.quantile(probability))

    def quantile(self, probability: float) -> float:
        """The loss below which the run ends with this probability."""
        low = float((self.means - 8 * self.deviations).min())
        high = float((self.means + 8 * self.deviations).max())
        for _ in range(40):
            middle = 0.5 * (low + high)
            below = float(self.weights @ ndtr((middle - self.means) / self.deviations))
            low, high = (middle, high) if below < probability else (low, middle)
        return 0.5 * (low + high)


def forecast(
    sizes: Sequence[float], losses: Sequence[float], error: float, freedom: int, size: float, run_error: float
) -> Forecast:
    """The loss of one new run at `size`.

    Args:
        sizes: of the rungs, distinct, at least three.
        losses: one per rung.
        error: estimated standard error of each.
        freedom: degrees of freedom of that estimate.
        size: where to look.
        run_error: estimated standard deviation of one run's loss.
    """
    order = np.argsort(sizes)
    x = np.log2(np.asarray([*sizes, size], dtype=float))
    x -= x.min()
    x, y = np.append(x[:-1][order], x[-1]), np.asarray(losses, dtype=float)[order]
    decay = 2.0 ** (-EXPONENTS[:, None] * x)  # A, n + 1: (s/s_1)^-α
    through = _through_the_ends(y, decay)
    gram, spread, log_determinant = _gram(x, y, decay, through, error, run_error)
    prior = _log_prior(len(y), freedom) - 0.5 * log_determinant
    some = _floored(gram, decay[:, -1], through, spread, y.min())
    none = _floorless(gram, decay[:, -1], through, spread)
    evidence = np.stack([prior + part[0] for part in (some, none)])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    means, deviations, floors = (np.stack([some[i], none[i]]) for i in (1, 2, 3))
    kept = weights > 1e-6 * weights.max()
    return Forecast(
        weights[kept] / weights[kept].sum(),
        means[kept],
        deviations[kept],
        exponent=float(np.einsum("fawsh,a->", weights, EXPONENTS)),
        floor=float((weights * floors).sum()),
    )


def _through_the_ends(y: Array, decay: Array) -> tuple[Array, Array]:
    """E and a of the curves through the first and the last loss: 2 times A. Only what is left of them is fitted, so
    that products do not cancel where the noise is small."""
    fall = (y[0] - y[-1]) / (1.0 - decay[:, len(y) - 1])
    return y[0] - fall, fall


def _gram(
    x: Array, y: Array, decay: Array, through: tuple[Array, Array], error: float, run_error: float
) -> tuple[Array, Array, Array]:
    """All that the data say: products of (1, decay, what is left of the losses, covariance with the target) under the
    inverse covariance.

    Returns:
        gram: A, W, S, H, 4, 4. spread: A, W, S, 1, the target's own variance. log_determinant: A, W, S, H.
    """
    n = len(y)
    fall = max(y[0] - y[-1], 2 * error) / (1.0 - decay[:, n - 1])  # a, as far as it scales the wandering
    wandering = fall[:, None, None] ** 2 * _wandering(x)
    covariance = WANDERINGS[:, None, None, None] ** 2 * wandering[:, None, None]  # A, W, 1, n + 1, n + 1
    cell = CELL * (fall * EXPONENTS)[:, None] * math.log(2.0) * x * decay  # A, n + 1: an exponent's neighbours
    covariance = covariance + (cell[:, :, None] * cell[:, None, :])[:, None, None]
    own = np.diag(np.append(np.full(n, error**2), run_error**2))
    covariance = covariance + NOISE_SCALES[:, None, None] ** 2 * own
    inverse = np.linalg.inv(covariance[..., :n, :n])
    shape = covariance.shape[:3]
    columns = np.empty((*shape, n, 4))
    columns[..., 0], columns[..., 1] = 1.0, decay[:, None, None, :n]
    columns[..., 2] = (y - through[0][:, None] - through[1][:, None] * decay[:, :n])[:, None, None]
    columns[..., 3] = covariance[..., :n, n]
    solved = inverse @ columns  # A, W, S, n, 4
    whole = np.swapaxes(columns, -1, -2) @ solved
    diagonal, extra = np.einsum("...ii->...i", inverse), (OUTLIER * error) ** 2
    shrunk = (extra / (1.0 + extra * diagonal))[..., None, None] * solved[..., :, None] * solved[..., None, :]
    gram = np.concatenate([whole[..., None, :, :], whole[..., None, :, :] - shrunk], axis=-3)
    base = -np.linalg.slogdet(inverse)[1][..., None]
    return gram, covariance[..., n, n, None], np.concatenate([base, base + np.log1p(extra * diagonal)], axis=-1)


def _wandering(x: Array) -> Array:
    """Covariance, over a² and the squared wandering, of ∫ W d(decay), W a Wiener process of x = log2 size: A, n, n."""
    k = (EXPONENTS * math.log(2.0))[:, None, None]
    first = np.minimum(x[:, None], x)
    one, other = np.exp(-k * x[:, None]), np.exp(-k * x)
    squares = (1.0 - np.exp(-2 * k * first)) / (2 * k)
    return squares - (one + other) * (1.0 - np.exp(-k * first)) / k + first * one * other


def _log_prior(rungs: int, freedom: int) -> Array:
    """Of wandering, noise scale and outlier: W, S, H. The noise's is the scaled inverse χ² of its estimate."""
    noise = -freedom * np.log(NOISE_SCALES) - 0.5 * freedom / NOISE_SCALES**2
    off = min(OUTLIER_PROBABILITY, 0.5 / rungs)
    outlier = np.log([1.0 - rungs * off, *[off] * rungs])
    noise -= np.log(np.exp(noise - noise.max()).sum()) + noise.max()
    return np.log(WANDERING_WEIGHTS)[:, None, None] + noise[:, None] + outlier


def _floorless(
    gram: Array, decay: Array, through: tuple[Array, Array], spread: Array
) -> tuple[Array, Array, Array, Array]:
    """Evidence, mean, deviation and floor (0) with a alone."""
    floor, fall = (part[:, None, None, None] for part in through)
    right = gram[..., 1, 2] + floor * gram[..., 1, 0]  # what is left of the losses without a floor
    squares = gram[..., 2, 2] + 2 * floor * gram[..., 0, 2] + floor**2 * gram[..., 0, 0]
    fit = right / gram[..., 1, 1]
    evidence = -0.5 * (squares - fit * right) - 0.5 * np.log(gram[..., 1, 1])
    end = decay[:, None, None, None]
    design = end - gram[..., 3, 1]
    mean = fall * end + design * fit + gram[..., 3, 2] + floor * gram[..., 3, 0]
    variance = spread - gram[..., 3, 3] + design**2 / gram[..., 1, 1]
    return evidence + math.log(NO_FLOOR_PROBABILITY), mean, np.sqrt(variance), np.zeros_like(mean)


def _floored(
    gram: Array, decay: Array, through: tuple[Array, Array], spread: Array, lowest: float
) -> tuple[Array, Array, Array, Array]:
    """Evidence, mean, deviation and floor with E >= 0 and a >= 0; E's truncation by its exact first two moments."""
    floor, fall = (part[:, None, None, None] for part in through)
    end = decay[:, None, None, None]
    precision, right = gram[..., :2, :2], gram[..., :2, 2]
    covariance = np.linalg.inv(precision)
    fit = np.einsum("...ij,...j->...i", covariance, right)
    design = np.stack([1.0 - gram[..., 3, 0], end - gram[..., 3, 1]], axis=-1)
    along = np.einsum("...ij,...j->...i", covariance, design)
    floor_sd, fall_sd = np.sqrt(covariance[..., 0, 0]), np.sqrt(covariance[..., 1, 1])
    z = (floor + fit[..., 0]) / floor_sd
    above = np.maximum(ndtr(z), 1e-300)
    lift = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) / above  # of the truncated mean, in standard deviations
    lift = np.where(z > -30.0, lift, -z)
    mean = floor + fall * end + np.einsum("...i,...i->...", design, fit) + gram[..., 3, 2]
    mean += along[..., 0] / floor_sd * lift
    variance = spread - gram[..., 3, 3] + np.einsum("...i,...i->...", design, along)
    variance -= (along[..., 0] / floor_sd) ** 2 * np.clip(lift * (lift + z), 0.0, 1.0)
    evidence = -0.5 * (gram[..., 2, 2] - np.einsum("...i,...i->...", right, fit))
    evidence -= 0.5 * np.log(np.linalg.det(precision))
    evidence += np.log(above) + np.log(np.maximum(ndtr((fall + fit[..., 1]) / fall_sd), 1e-300))
    prior = math.log((1.0 - NO_FLOOR_PROBABILITY) * math.sqrt(2 * math.pi) / lowest)
    floors = floor + fit[..., 0] + floor_sd * lift
    return evidence + prior, mean, np.sqrt(np.maximum(variance, 0.01 * spread)), floors
