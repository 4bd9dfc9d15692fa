"""What a monitor has to say."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ADVICE", "Alert", "GradientAlertError"]

# What usually helps, by kind.
ADVICE: dict[str, str] = {
    "growing": "Clip by the global norm, or lower the learning rate (at the beginning, warm up). "
    "Look at the layer that is named: its weights, its initialisation, what comes after it.",
    "exploded": "The step that follows is wasted or worse: clip by the global norm, or leave it out "
    "(gradclip.policies.SkipStep). Go back to the last good checkpoint if the loss does not come "
    "down again.",
    "nonfinite": "Leave the step out (nonfinite='skip'). In float16 use loss scaling, or bfloat16; look for "
    "a division or a logarithm near 0, and for a broken batch.",
    "vanishing": "The layer learns nothing now: look at saturated activations, at its initialisation; "
    "in float16 use loss scaling.",
    "dead": "Every element is 0: dead ReLUs, a layer that the loss does not depend on, or float16 without "
    "loss scaling.",
    "missing": "The parameter had no gradient: it is frozen, was not used, or is not in the optimizer.",
    "oscillating": "The loss goes up and down from step to step: the learning rate is too high.",
    "always_clipped": "Every step is clipped, so that its length is the threshold times the learning rate: "
    "raise the threshold, or let a policy find it (gradclip.policies).",
    "never_clipped": "The threshold does nothing: lower it, or let a policy find it (gradclip.policies).",
}
# Kinds that say nothing about gradients themselves.
INFORMATION = frozenset({"missing", "always_clipped", "never_clipped"})


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should look at.

    Attributes:
        kind: ``"growing"`` (a norm will have exploded in some steps), ``"exploded"``, ``"nonfinite"``,
            ``"vanishing"``, ``"dead"`` (zero, and not missing), ``"missing"``, ``"oscillating"`` (the loss),
            ``"always_clipped"``, ``"never_clipped"``.
        step: The step, from 1.
        layer: The gradient that is worst; ``None`` where it is no single one.
        message: What was seen, with its figures, as a sentence.
        figures: The same as numbers.
        layers: All gradients of which it is true.
    """

    kind: str
    step: int
    layer: str | None
    message: str
    figures: dict[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """What usually helps."""
        return ADVICE[self.kind]

    @property
    def is_warning(self) -> bool:
        """Whether something is wrong; else it is information."""
        return self.kind not in INFORMATION

    def as_dict(self) -> dict[str, Any]:
        """As plain objects, for JSON."""
        return {**asdict(self), "layers": list(self.layers), "advice": self.advice}

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class GradientAlertError(RuntimeError):
    """A monitor was asked to raise, and has something to say.

    Attributes:
        alert: What.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(f"{alert}. {alert.advice}")
        self.alert = alert

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.alert,)
