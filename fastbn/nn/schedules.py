"""Schedules: small functions from a number of steps taken to a factor of the learning rate.

A training loop sets ``optimizer.lr = lr * schedule(optimizer.steps)`` before each step. Nothing is kept between steps,
so that a resumed run needs nothing of them. `functools.partial` gives the ones with arguments: ``partial(cosine,
steps=1000)``.
"""

from __future__ import annotations

from math import cos, pi

from .. import checks


def constant(step: int) -> float:
    """1, always.

    Parameters
    ----------
    step : int
        Steps taken so far: 0 for the first.
    """
    return 1.0


def exponential(step: int, *, gamma: float) -> float:
    """gamma to the power of `step`, as torch's ExponentialLR.

    Parameters
    ----------
    step : int
    gamma : float
        Greater than 0, at most 1: what is left after each step.
    """
    return checks.number_in("gamma", gamma, 0, 1, above=True) ** step


def cosine(step: int, *, steps: int, final: float = 0.0) -> float:
    """From 1 to `final` along half a wave of the cosine, and `final` from then on, as torch's CosineAnnealingLR.

    Parameters
    ----------
    step : int
    steps : int
        Steps after which `final` is reached; at least 1.
    final : float
        From 0 to 1.

    References
    ----------
    Loshchilov and Hutter (2017), "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, without restarts.
    """
    steps, final = checks.positive("steps", steps), checks.number_in("final", final, 0, 1)
    return final + (1 - final) * (1 + cos(pi * min(step, steps) / steps)) / 2
