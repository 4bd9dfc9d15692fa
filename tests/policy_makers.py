"""A policy of each kind, with windows so short that a test gets through them."""

from __future__ import annotations

from typing import Any

from gradclip.policies import (
    SPAM,
    AdaGC,
    AutoClip,
    FirstMatch,
    Lowest,
    Normalized,
    Percentile,
    SkipStep,
    UpdateRMS,
    WarmUp,
    ZClip,
)

__all__ = ["MAKE"]

MAKE: dict[str, Any] = {
    "Percentile": lambda: Percentile(50, 4),
    "AutoClip": AutoClip,
    "ZClip": lambda: ZClip(warmup=3),
    "AdaGC": lambda: AdaGC(warmup=2),
    "SPAM": lambda: SPAM(2.0),
    "SkipStep": lambda: SkipStep(1.0, 4),
    "Normalized": Normalized,
    "UpdateRMS": UpdateRMS,
    "Lowest": lambda: Lowest(ZClip(warmup=3), Percentile(90, 5), 5.0),
    "WarmUp": lambda: WarmUp(2.0, 4, ZClip(warmup=3)),
    "FirstMatch": lambda: FirstMatch({"b.*": None, "*": Lowest(Percentile(90, 5), SkipStep(1.0, 4))}),
}
