"""Rows of a laboratory whose runs never ran: plausible, the same every time, and as bad as a test wants."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NoReturn

import numpy as np

from gradclip._lab.experiment import Settings

__all__ = ["World", "die", "made_up_row", "made_up_rows"]

# Mixed: some runs learn, some explode, some are lost. Calm: all learn. Broken: all explode in the first step
# and are lost, and nothing that they leave is finite, but for the gradients of units that saturate.
World = Literal["mixed", "calm", "broken"]

_POINTS = 5  # of a curve


def made_up_row(settings: Settings, variant: int = 0, world: World = "mixed") -> dict[str, Any]:
    """What ``experiment.run`` could have found, in the same form.

    Args:
        settings: Of the run.
        variant: Another one has other figures everywhere.
        world: How runs end.
    """
    varied = settings.varied()
    rng = np.random.default_rng([variant, zlib.crc32(repr(varied).encode())])
    text = settings.subject == "text"
    layers = ["recurrent", "output"] if text else [f"layer{i:02d}" for i in range(1, settings.depth + 1)]
    saturates = settings.activation in ("tanh", "sigmoid")
    exploded = bool(rng.random() < {"mixed": 0.5, "calm": 0.0, "broken": 1.0}[world])
    at_once = exploded and (
        not saturates if world == "broken" else bool(settings.steps == 1 or rng.random() < 0.3)
    )
    lost = exploded and (world == "broken" or bool(rng.random() < 0.5))
    step = (
        None
        if not exploded
        else 1
        if at_once or world == "broken"
        else int(rng.integers(2, settings.steps + 1))
    )
    done = settings.steps if not lost or step is None else min(step + 1, settings.steps)
    learnt = not exploded if world != "mixed" else bool(rng.random() < 0.5)
    right = 0.25 if text else 0.9
    accuracy = right + (1 - right) * rng.random() if learnt else right * rng.random()
    warned = None if world == "calm" or rng.random() < 0.2 else int(rng.integers(1, max(done, 2)))
    gain = 10.0 ** rng.uniform(-0.6, 0.3)

    def figure(scale: float = 1.0) -> float:
        return float(f"{scale * 10.0 ** rng.uniform(-2, 2):.4g}")

    def unless(broken: bool, scale: float = 1.0) -> float | None:
        value = figure(scale)
        return None if broken else value

    row = varied | {"subject": settings.subject}
    if text:
        row["memory"] = [float(f"{gain ** (39 - i):.4g}") for i in range(40)]
    deltas = [float(f"{0.1 * gain ** (len(layers) - i):.4g}") for i in range(len(layers))]
    row |= {
        "layers": layers,
        "first_norms": [unless(at_once) for _ in layers],
        "first_norm": unless(at_once, 10.0),
        "signal_rms": [unless(at_once and i > 1) for i, _ in enumerate(layers)],
        "delta_rms": [None if at_once and world == "broken" else delta for delta in deltas],
        "steps_done": done,
        "lost": lost,
        "exploded_step": step,
        "exploded_layer": str(rng.choice(layers)) if exploded else None,
        "growing_step": warned,
        "warned_step": warned,
        "warned_of": None if warned is None else str(rng.choice(["growing", "exploded", "vanishing"])),
        "largest_norm": unless(at_once, 1e4 if exploded else 1.0),
        "clipped_share": 0.0 if settings.clipping == "none" else round(rng.random(), 4),
        "first_loss": 100.0 + figure(),
        "last_loss": unless(lost),
        "test_loss": unless(lost),
        "test_accuracy": round(accuracy, 4),
        "seconds_clip": figure(1e-4),
        "seconds_rest": figure(1e-3),
    }
    if settings.in_detail:
        shown = sorted(set(np.linspace(1, done, _POINTS).round().astype(int).tolist()))
        broken = [exploded and step is not None and i >= step for i in shown]
        row["steps_shown"] = shown
        row["losses"] = [unless(is_broken) for is_broken in broken]
        row["norms"] = [unless(is_broken) for is_broken in broken]
        row["layer_norms"] = [[unless(is_broken) for _ in layers] for is_broken in broken]
    return row


def made_up_rows(
    settings: Iterable[Settings], variant: int = 0, world: World = "mixed", seeds: int = 1
) -> list[dict[str, Any]]:
    """A row for each of the settings, with as many seeds as wanted."""
    return [made_up_row(replace(one, seed=seed), variant, world) for one in settings for seed in range(seeds)]


def die(settings: Settings) -> NoReturn:
    """As if the system had killed the process."""
    del settings
    os._exit(9)
