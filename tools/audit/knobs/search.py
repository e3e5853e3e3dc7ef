"""Settings that no list can hold. Ports have another theta, another cap, another eps or a window of any size: the one
that brings the port closest is looked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tools.audit.knobs.knob import Knob, Knobs

if TYPE_CHECKING:
    from tools.audit.causes import Case


def distance_with(case: Case, knob: Knob) -> float:
    """How far the port is from the place with a knob turned; infinite if the knob does not reach it."""
    results = case.run(knob, case.layers)
    if case.name not in results:
        return math.inf
    return case.distance(case.name, results[case.name], case.rows)


def fitted(case: Case, settings: list[float], make: Callable[[float], Knob]) -> Knobs:
    """The knob whose setting brings the port closest, from a list of settings and then between its neighbours."""

    def distance(setting: float) -> float:
        found = distance_with(case, make(setting))
        return found if math.isfinite(found) else math.inf

    settings = sorted(settings)
    distances = [distance(setting) for setting in settings]
    best = min(range(len(settings)), key=distances.__getitem__)
    if distances[best] == math.inf:
        return
    low = settings[max(best - 1, 0)]
    high = settings[min(best + 1, len(settings) - 1)]
    found, least = narrowed(distance, low, settings[best], high, distances[best])
    yield make(simplest(distance, settings, found, least))


def narrowed(
    distance: Callable[[float], float], low: float, found: float, high: float, least: float
) -> tuple[float, float]:
    """The best setting between two others, and its distance: each step halves the logarithm of one side."""
    for _ in range(60):
        if high < 1.0002 * low:
            break
        below = (low * found) ** 0.5
        above = (found * high) ** 0.5
        distance_below = distance(below)
        if distance_below < least:
            high = found
            found = below
            least = distance_below
            continue
        distance_above = distance(above)
        if distance_above < least:
            low = found
            found = above
            least = distance_above
            continue
        low = below
        high = above
    return found, least


def simplest(distance: Callable[[float], float], settings: list[float], found: float, least: float) -> float:
    """A usual or a round number, if it is as good as what was found; what is left may be rounding alone."""
    slack = 2 if least < 2 else 1
    candidates = [
        (float(f"{found:.0e}"), 0.05),
        (float(f"{found:.1e}"), 0.02),
        (float(f"{found:.2e}"), 0.003),
    ]
    usual = min(settings, key=lambda setting: abs(math.log(setting / found)))
    if abs(math.log(usual / found)) < 0.1:
        candidates.insert(0, (usual, 0.05))
    for candidate, tolerance in candidates:
        if distance(candidate) <= (1 + slack * tolerance) * least:
            return candidate
    return found


def told(value: float) -> str:
    """A fitted setting in four digits."""
    four_digits = float(f"{value:.4g}")
    return f"{four_digits:g}"


def closest(case: Case, settings: list[int], make: Callable[[int], Knob], step: int) -> Knobs:
    """The knob whose whole-numbered setting brings the port closest: every `step`-th is tried, then those around the
    best two."""

    def distance(setting: int) -> float:
        return distance_with(case, make(setting))

    if not settings:
        return
    coarse = sorted(settings[::step], key=distance)
    around: set[int] = set()
    for setting in coarse[:2]:
        around.update(other for other in settings if abs(other - setting) < step)
    best = min(sorted(around), key=distance)
    yield make(best)
