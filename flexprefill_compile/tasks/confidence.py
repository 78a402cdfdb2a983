"""How sure a difference between dense and sparse is, from few samples that both answered: 95 % intervals."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class ConfidenceInterval:
    """Where a mean lies, with 95 % confidence."""

    low: float
    high: float

    def is_below(self, value: float) -> bool:
        """Whether the whole interval lies below a value."""
        return self.high < value

    def is_above(self, value: float) -> bool:
        """Whether the whole interval lies above a value."""
        return self.low > value


EVERYTHING = ConfidenceInterval(-math.inf, math.inf)


def compute_mean_interval(differences: Sequence[float], level: float = _LEVEL) -> ConfidenceInterval:
    """Compute Student's interval of the mean of paired differences; one sample alone says nothing.

    Args:
        differences: Sparse minus dense, one for each sample.
        level: The confidence.
    """
    if len(differences) < 2:
        return EVERYTHING
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = error * find_student_quantile((1 + level) / 2, len(differences) - 1)
    return ConfidenceInterval(mean - reach, mean + reach)


def compute_share_interval(dense: Sequence[bool], sparse: Sequence[bool], level: float = _LEVEL) -> ConfidenceInterval:
    """Compute the interval of the difference of two shares, sparse minus dense, of the same samples.

    It has a width even if both agree on every sample. Newcombe 1998, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", method 10: Wilson's intervals of both shares, squared and added
    with their correlation, which is corrected for continuity where it is positive.

    Args:
        dense: Whether dense was right, one for each sample.
        sparse: The same of sparse.
        level: The confidence.
    """
    count = len(dense)
    both = sum(d and s for d, s in zip(dense, sparse, strict=True))
    neither = sum(not d and not s for d, s in zip(dense, sparse, strict=True))
    num_dense, num_sparse = sum(dense), sum(sparse)
    only_sparse, only_dense = num_sparse - both, num_dense - both
    margins = num_sparse * (count - num_sparse) * num_dense * (count - num_dense)
    agreement = float(both * neither - only_sparse * only_dense)
    agreement = max(agreement - count / 2, 0.0) if agreement > 0 else agreement
    correlation = agreement / math.sqrt(margins) if margins else 0.0
    first, second = (compute_wilson_interval(number, count, level) for number in (num_sparse, num_dense))
    share, other = num_sparse / count, num_dense / count
    low = _add_squares(share - first.low, second.high - other, correlation)
    high = _add_squares(first.high - share, other - second.low, correlation)
    return ConfidenceInterval(share - other - low, share - other + high)


def compute_wilson_interval(number: int, count: int, level: float = _LEVEL) -> ConfidenceInterval:
    """Compute Wilson's score interval of a share, ``number`` of ``count``."""
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share = number / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return ConfidenceInterval(max(0.0, centre - reach), min(1.0, centre + reach))


def find_student_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t with whole degrees of freedom stays below with a probability of 0.5 to 1."""
    high = 1.0
    while compute_student_probability(high, degrees) < probability:
        high *= 2
    return _bisect(lambda t: compute_student_probability(t, degrees) < probability, 0.0, high)


def compute_student_probability(t: float, degrees: int) -> float:
    """Compute the probability that Student's t stays below ``t >= 0``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(2 + is_odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    two_sided = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return (1 + two_sided) / 2


def _bisect(is_low: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return high


def _add_squares(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))
