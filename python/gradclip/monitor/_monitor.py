"""The monitor: fed with the result of every clip, it remembers, and says what it sees coming."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from gradclip._result import count_of
from gradclip.monitor._alerts import Alert, GradientAlertError
from gradclip.monitor._watch import Floats, LossWatch, Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientMonitor", "Writer"]

OnAlert = Literal["warn", "raise"] | Callable[[Alert], object] | None

_MOST_NAMED = 3  # layers in a message
_SILENCE = 50  # steps for which what was said is not said again, unless it comes back after so many


class Writer(Protocol):
    """What writes the numbers of steps somewhere."""

    def write(self, step: int, numbers: dict[str, float | int | bool], alerts: Sequence[Alert]) -> None:
        """One step: numbers under flat names, as of ``ClipResult.as_dict()``, and the ``loss``."""

    def close(self) -> None:
        """After the last step."""


class GradientMonitor:
    """Watches the norms of a training, and says what goes wrong before it has.

    It keeps a bounded history of every gradient's norm, and what is usual of its logarithm. In every step it
    looks whether a norm grows such that it will have exploded within ``horizon`` steps, has exploded,
    vanished, become zero or not finite, whether the loss oscillates, and whether the threshold is always or
    never reached. What was said is not said again until it has been well for 50 steps.

    Results of a GPU are waited for: update with every tenth, if that matters.

    Args:
        names: What the gradients are called; by default as the first result calls them.
        horizon: How many steps ahead an explosion is said.
        explosion: What an explosion is: so many times the usual norm.
        patience: In how many steps in a row a gradient must have vanished, be zero or missing before it is
            said.
        window: How many steps are remembered.
        clips: Whether results are of clips by a threshold; ``False`` where norms are only measured.
        on_alert: ``"warn"``: a UserWarning for each. ``"raise"``: :class:`GradientAlertError` for the first
            that is a warning. Or a function that is called with each.
        writers: What gets the numbers of every step: :class:`CsvWriter`, :class:`TensorBoardWriter` and
            others.
        write_every: Of how many steps the numbers of one are written; alerts always are.
        save_to: A directory. For every warning it gets a JSON file with the alert and the history of norms,
            and beside it, pickled, the ``batch`` that the step was made of, to replay it.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.monitor import GradientMonitor
        >>> monitor = GradientMonitor()
        >>> for step in range(40):
        ...     norm = 1.0 if step < 30 else 3.0 ** (step - 30)
        ...     grads = {"embed": np.array([1.0]), "head": np.array([norm])}
        ...     result = gradclip.clip_by_global_norm_(grads, max_norm=1.0)
        ...     for alert in monitor.update(result):
        ...         print(alert)
        step 35: head grows 1.9 x a step and will be 1000 times its usual norm in 6 steps
        step 38: head has 2004 times its usual norm: 2187, usually 1.091
    """

    def __init__(
        self,
        names: Iterable[str] | None = None,
        *,
        horizon: int = 10,
        explosion: float = 1000.0,
        patience: int = 10,
        window: int = 256,
        clips: bool = True,
        on_alert: OnAlert = None,
        writers: Iterable[Writer] = (),
        write_every: int = 1,
        save_to: str | Path | None = None,
    ) -> None:
        for name, number in (
            ("horizon", horizon), ("patience", patience), ("window", window), ("write_every", write_every),
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: expected an integer, got {type(number).__name__}")
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if not 1 < explosion < math.inf:
            raise ValueError(f"explosion: expected a finite number above 1, got {explosion!r}")
        if not (on_alert in ("warn", "raise", None) or callable(on_alert)):
            raise ValueError(f"on_alert: expected 'warn', 'raise', a function or None, got {on_alert!r}")
        self.names: tuple[str, ...] | None = None if names is None else tuple(names)
        self.step = 0
        self.alerts: deque[Alert] = deque(maxlen=1000)
        self._limit = math.log(explosion)
        self._explosion = explosion
        self._horizon = horizon
        self._patience = patience
        self._clips = clips
        self._on_alert = on_alert
        self._writers = tuple(writers)
        self._write_every = write_every
        self._save_to = None if save_to is None else Path(save_to)
        self._said: dict[str, int] = {}  # by kind: the last step in which it was true
        self._run = [0, 0]  # steps in a row without, and with a clip
        self._loss = LossWatch()
        self._norms: deque[Floats] = deque(maxlen=window)
        # Total norm before and after, lowest coefficient, loss.
        self._totals: deque[tuple[float, float, float, float]] = deque(maxlen=window)
        if self.names is not None:
            self._begin(len(self.names))

    def _begin(self, width: int) -> None:
        self._watch = Watch(width + 1, self._horizon)  # the last is the norm of all together
        self._row = np.empty(width + 1)
        self._low = np.zeros(width, int)  # steps in a row
        self._zero = np.zeros(width, int)
        self._absent = np.zeros(width, int)

    # --- What was seen ----------------------------------------------------------------------------

    @property
    def norms(self) -> Floats:
        """Norms of the last steps, a row for each, a column for each gradient."""
        return np.array(self._norms).reshape(len(self._norms), len(self.names or ()))

    @property
    def total_norms(self) -> Floats:
        """Global norms of the last steps, before clipping."""
        return self._column(0)

    @property
    def clipped_norms(self) -> Floats:
        """The same after clipping, where all gradients share a coefficient; else NaN."""
        return self._column(1)

    @property
    def coefficients(self) -> Floats:
        """The lowest coefficient of each of the last steps."""
        return self._column(2)

    @property
    def losses(self) -> Floats:
        """Losses of the last steps, NaN where none was given."""
        return self._column(3)

    def _column(self, place: int) -> Floats:
        return np.array([row[place] for row in self._totals])

    # --- A step -----------------------------------------------------------------------------------

    def update(self, result: Any, loss: Any = None, *, batch: Any = None) -> list[Alert]:
        """Look at a step.

        Args:
            result: What a clip returned (:class:`gradclip.ClipResult`), or :class:`gradclip.Measured`.
            loss: Of this step: a number, or an array of one.
            batch: What is to be saved with a warning, where the monitor saves: anything that can be pickled.

        Returns:
            What there is to say, warnings first.

        Raises:
            TypeError: It is no result.
            ValueError: It has another number of gradients, or other names, than those before; nothing is
                changed.
            GradientAlertError: As the monitor was told to.
        """
        to_host = getattr(result, "to_host", None)
        host = result if to_host is None else to_host()
        if not hasattr(host, "norms") or not hasattr(host, "total_norm"):
            raise TypeError(f"result: expected what a clip returned, got {type(result).__name__}")
        norms = host.norms
        self._check(host, len(norms))
        coefficient = getattr(host, "coefficient", 1.0)
        is_one = isinstance(coefficient, float)
        lowest = coefficient if is_one else float(np.min(coefficient, initial=1.0))
        total = float(host.total_norm)
        value = math.nan if loss is None else float(loss)

        self.step += 1
        self._norms.append(norms)
        self._totals.append((total, total * lowest if is_one else math.nan, lowest, value))
        alerts = self._look(host, norms, total, lowest, value)
        if self._writers and (alerts or self.step % self._write_every == 0):
            numbers = host.as_dict() if hasattr(host, "as_dict") else {"total_norm": total}
            if loss is not None:
                numbers["loss"] = value
            for writer in self._writers:
                writer.write(self.step, numbers, alerts)
        if alerts:
            self._tell(alerts, batch)
        return alerts

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, host: Any, width: int) -> None:
        if self.names is None:
            self.names = tuple(host.names) if host.names is not None else tuple(map(str, range(width)))
            self._begin(width)
        elif len(self.names) != width:
            raise ValueError(
                f"result: expected norms of the {count_of(len(self.names), 'gradient')} that this monitor "
                f"watches, got {width}"
            )
        elif host.names is not None and host.names != self.names:
            other = next(a for a, b in zip(host.names, self.names, strict=True) if a != b)
            raise ValueError(f"result: expected the gradients that this monitor watches, got {other!r}")

    def _look(self, host: Any, norms: Floats, total: float, lowest: float, loss: float) -> list[Alert]:
        alerts: list[Alert] = []
        # A finite sum has finite norms alone; one that has overflowed is no reason to look at none.
        if not math.isfinite(total) or host.nonfinite:
            self._say_nonfinite(alerts, host)
        else:
            watch, was_ready = self._watch, self._watch.is_ready
            self._row[:-1], self._row[-1] = norms, total
            watch.add(self._row)
            if was_ready:
                if watch.off.max() > self._limit:
                    self._say_exploded(alerts)
                elif watch.ahead.max() > self._limit:
                    self._say_growing(alerts)
                self._look_down(alerts, host, norms)
        if loss == loss:  # noqa: PLR0124 (not NaN)
            correlation = self._loss.add(loss)
            if correlation < -0.7:
                message = f"the loss goes up and down from step to step (correlation {correlation:.2f})"
                self._say(alerts, "oscillating", message, {"correlation": correlation})
        if self._clips:
            self._look_at_threshold(alerts, lowest < 1.0)
        return alerts

    def _look_down(self, alerts: list[Alert], host: Any, norms: Floats) -> None:
        watch = self._watch
        is_low = watch.off.min() < -self._limit
        is_zero = norms.min(initial=1.0) == 0.0
        if not (is_low or is_zero or self._low_before):
            return
        absent = np.zeros(len(norms), bool)
        if host.missing:
            absent[self._places(host.missing)] = True
        zero = (norms == 0) & ~absent
        low = (watch.off[:-1] < -self._limit) & (norms > 0)
        self._absent, self._zero, self._low = (
            (counts + 1) * now
            for counts, now in ((self._absent, absent), (self._zero, zero), (self._low, low))
        )
        self._low_before = bool(is_low or is_zero)
        watch.hold(low & (self._low < self._patience))  # else the fall would be usual soon
        for kind, counts, text in (
            ("missing", self._absent, "no gradient"),
            ("dead", self._zero, "a gradient of zeros"),
            ("vanishing", self._low, f"less than 1/{self._explosion:g} of the usual norm"),
        ):
            found = np.flatnonzero(counts == self._patience)
            if found.size:
                names = self._named(found)
                message = f"{_listed(names)} had {text} for {count_of(self._patience, 'step')}"
                figures = {"steps": float(self._patience)}
                if kind == "vanishing":
                    figures["norm"] = float(norms[found[0]])
                self._say(alerts, kind, message, figures, names, again=True)

    _low_before = False

    def _look_at_threshold(self, alerts: list[Alert], clipped: bool) -> None:
        self._run[clipped] += 1
        self._run[not clipped] = 0
        many = 20 * self._patience
        if self._run[1] >= many:
            self._say(alerts, "always_clipped", f"every one of the last {many} steps was clipped")
        elif self._run[0] >= 5 * many:
            self._say(alerts, "never_clipped", f"none of the last {5 * many} steps was clipped")

    def _say_nonfinite(self, alerts: list[Alert], host: Any) -> None:
        names = self._named(self._places(host.nonfinite))
        what = f"{_listed(names)} had NaN or infinities" if names else "the global norm is not finite"
        self._say(alerts, "nonfinite", what, {"gradients": float(len(names))}, names)

    def _say_exploded(self, alerts: list[Alert]) -> None:
        watch = self._watch
        found = np.flatnonzero((watch.off > self._limit) & (watch.off > 6 * watch.spread))
        if not found.size:
            return
        found = found[np.argsort(-watch.off[found], kind="stable")]
        off, norm = float(watch.off[found[0]]), float(self._row[found[0]])
        names, times, usual = self._named(found), _exp(off), _exp(math.log(norm) - off)
        message = f"{_first(names)} has {times:.4g} times its usual norm: {norm:.4g}, usually {usual:.4g}"
        figures = {"norm": norm, "usual": usual}
        self._say(alerts, "exploded", message + _others(names), figures, names)

    def _say_growing(self, alerts: list[Alert]) -> None:
        watch = self._watch
        far = np.maximum(3 * watch.spread, math.log(3))
        # The last norm, too: a line goes on rising after a spike.
        is_far = (watch.up > far) & (watch.off > far)
        found = np.flatnonzero((watch.ahead > self._limit) & (watch.slope > 0) & is_far)
        if not found.size:
            return
        left = (self._limit - watch.up[found]) / watch.slope[found]
        order = np.argsort(left, kind="stable")
        found, left = found[order], left[order]
        names, rate, steps = self._named(found), _exp(watch.slope[found[0]]), max(1, math.ceil(left[0]))
        message = (
            f"{_first(names)} grows {rate:.2g} x a step and will be {self._explosion:g} times its usual norm "
            f"in {count_of(steps, 'step')}"
        )
        figures = {"rate": rate, "steps": float(steps), "times_usual": _exp(watch.up[found[0]])}
        self._say(alerts, "growing", message + _others(names), figures, names)

    def _say(
        self,
        alerts: list[Alert],
        kind: str,
        message: str,
        figures: dict[str, float] | None = None,
        layers: tuple[str, ...] = (),
        again: bool = False,
    ) -> None:
        last = self._said.get(kind)
        self._said[kind] = self.step
        if again or last is None or self.step - last > _SILENCE:
            alerts.append(
                Alert(kind, self.step, layers[0] if layers else None, message, figures or {}, layers)
            )

    def _places(self, entries: Sequence[int] | Sequence[str]) -> list[int]:
        if entries and isinstance(entries[0], str):
            place_of = {name: i for i, name in enumerate(self.names or ())}
            return [place_of[name] for name in entries]  # type: ignore[index]
        return [int(i) for i in entries]

    def _named(self, places: Iterable[int]) -> tuple[str, ...]:
        """The names of gradients; none for the norm of all, which comes last."""
        names = self.names or ()
        return tuple(names[i] for i in places if i < len(names))

    def _tell(self, alerts: list[Alert], batch: Any) -> None:
        alerts.sort(key=lambda alert: not alert.is_warning)
        self.alerts.extend(alerts)
        for alert in alerts:
            if self._save_to is not None and alert.is_warning:
                self._save(alert, batch)
            if callable(self._on_alert):
                self._on_alert(alert)
            elif self._on_alert == "warn":
                warnings.warn(f"{alert}. {alert.advice}", stacklevel=3)
        if self._on_alert == "raise" and alerts[0].is_warning:
            raise GradientAlertError(alerts[0])

    def _save(self, alert: Alert, batch: Any) -> None:
        assert self._save_to is not None
        self._save_to.mkdir(parents=True, exist_ok=True)
        path = self._save_to / f"step-{alert.step:07d}-{alert.kind}.json"
        history = {"names": self.names, "norms": self.norms.tolist(), "losses": self.losses.tolist()}
        path.write_text(json.dumps({"alert": alert.as_dict(), "history": history}))
        if batch is not None:
            path.with_suffix(".batch.pkl").write_bytes(pickle.dumps(batch))

    def plot(self, path: str | Path | None = None) -> Figure:
        """Norms of the last steps: all together, by gradient, and the loss, with the alerts.

        Needs matplotlib (``gradclip[monitor]``).

        Args:
            path: Where the picture is saved, if anywhere.

        Returns:
            The figure.
        """
        from gradclip.monitor._plot import plot  # noqa: PLC0415 (needs matplotlib)

        figure = plot(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        watched = "nothing yet" if self.names is None else count_of(len(self.names), "gradient")
        seen = f"{count_of(self.step, 'step')}, {count_of(len(self.alerts), 'alert')}"
        return f"GradientMonitor({watched}, {seen})"


def _exp(log: float) -> float:
    """Of a difference of logarithms, which can be more than float64 has."""
    return math.exp(min(log, 709.0))


def _first(names: tuple[str, ...]) -> str:
    return names[0] if names else "the norm of all gradients"


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _others(names: tuple[str, ...]) -> str:
    return "" if len(names) < 2 else f"; and {count_of(len(names) - 1, 'more gradient')}"
