"""Curves over log σ: what a decoder costs for each σ of a grid, and where it costs least between them."""

from collections.abc import Sequence

import numpy as np

# The log σ at which L_0 is measured: half of a level's width is 1/255, and a third of that e^−6.6, so that
# below −8 a smaller σ gains nothing; 1 is half of the range of the images
LOG_SIGMAS = tuple(np.linspace(-8, 0, 33).tolist())
NEAR = 5  # points of a curve that are interpolated at once


def value_at(curve: np.ndarray, log_sigma: float) -> float:
    """A curve at one log σ; outside of `LOG_SIGMAS` it is that of the end."""
    log_sigma = min(max(log_sigma, LOG_SIGMAS[0]), LOG_SIGMAS[-1])
    return float(_near(curve, int(np.abs(np.subtract(LOG_SIGMAS, log_sigma)).argmin()))(log_sigma))


def lowest(curve: np.ndarray) -> tuple[float, float]:
    """Where a curve over `LOG_SIGMAS` is lowest, and its value there."""
    place = int(curve.argmin())
    points: Sequence[float] = np.linspace(
        LOG_SIGMAS[max(place - 1, 0)], LOG_SIGMAS[min(place + 1, len(curve) - 1)], 501
    ).tolist()
    values = _near(curve, place)(np.array(points))
    return points[int(values.argmin())], float(values.min())


def _near(curve: np.ndarray, place: int) -> np.polynomial.Polynomial:
    """The polynomial through the points of a curve over `LOG_SIGMAS` that lie nearest to a place."""
    start = min(max(place - NEAR // 2, 0), len(curve) - NEAR)
    part = slice(start, start + NEAR)
    return np.polynomial.Polynomial.fit(LOG_SIGMAS[part], curve[part], NEAR - 1)
