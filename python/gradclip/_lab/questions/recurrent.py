"""Networks with a memory: the gradient goes back through time, by the same matrix again and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from gradclip._lab.experiment import Settings
from gradclip._lab.questions._base import LEARNT, Question, Rows, count_of, outcomes, percent, seeds, times
from gradclip._report.style import COLORS, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["Recurrent"]

_GAINS = (0.5, 1.0, 1.5, 2.0)
_ELMAN = Settings(network="elman", activation="tanh", initialisation="orthogonal")
_LSTM = replace(_ELMAN, network="lstm")


class Recurrent(Question):
    """Elman against LSTM."""

    name = "recurrent"
    title = "And in recurrent networks?"
    background = (
        "A recurrent network reads a text character by character. Going back 40 characters, the gradient is "
        "multiplied by the same matrix 40 times: 0.8 to the power of 40 is a ten-thousandth, 1.25 to that "
        "power nearly ten thousand. It is for these networks that clipping by the norm was proposed. An "
        "LSTM has gates that let the gradient pass. Both learn to guess the next character of an English "
        "text; a guess without reading has some 15 %, and within 300 steps 25 % counts as learnt. The "
        "recurrent matrix starts as a rotation times a factor."
    )

    def design(self, quick: bool) -> list[Settings]:
        gains, rates = ((1.0, 2.0), (0.5,)) if quick else (_GAINS, (0.1, 0.5))
        points = [
            replace(_ELMAN, gain=gain, learning_rate=rate, clipping=clipping)
            for gain in gains
            for rate in rates
            for clipping in ("none", "global")
        ]
        points += [
            replace(_LSTM, learning_rate=2.0 if quick else rate, clipping=clipping)
            for rate in ((2.0,) if quick else (0.5, 2.0))
            for clipping in (("none",) if quick else ("none", "global"))
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        fast = rows[(rows["network"] == "elman") & (rows["learning_rate"] == 0.5)]
        plain, clipped = fast[fast["clipping"] == "none"], fast[fast["clipping"] == "global"]
        lstm = rows[
            (rows["network"] == "lstm") & (rows["learning_rate"] == 2.0) & (rows["clipping"] == "none")
        ]
        reach = {gain: _reach(chosen) for gain, chosen in rows[rows["network"] == "elman"].groupby("gain")}
        low, high = min(reach), max(reach)
        return [
            f"Elman networks at a learning rate of 0.5: {count_of(plain, 'trouble')} came to grief as they "
            f"were, {count_of(clipped, 'trouble')} with clipping. {count_of(plain, 'learnt')} and "
            f"{count_of(clipped, 'learnt')} reached {percent(LEARNT['text'])}.",
            f"Of the gradient of the last character, {times(reach[low])} of its size arrives 39 characters "
            f"earlier in an Elman network whose matrix is a rotation times {low:g}, and "
            f"{times(reach[high])} where it is times {high:g}; in an LSTM {times(_reach(lstm))}.",
            "The LSTM trains at a learning rate of 2, four times as high, without clipping: "
            f"{count_of(lstm, 'trouble')} runs came to grief, the median accuracy is "
            f"{percent(lstm['test_accuracy'].median())}.",
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        elman = rows[rows["network"] == "elman"]
        gains = sorted(elman["gain"].unique())
        curves = [(f"Elman, times {gain:g}", elman[elman["gain"] == gain]) for gain in gains]
        curves.append(("LSTM", rows[rows["network"] == "lstm"]))
        for color, (name, chosen) in zip(COLORS, curves, strict=False):
            sizes = np.median(np.array(chosen["memory"].tolist(), float), axis=0)
            left.plot(range(1 - len(sizes), 1), np.maximum(sizes, 1e-20), color=color, label=name)
        left.set_yscale("log")
        left.set_xlabel("characters before the last")
        left.set_ylabel("size of the gradient, of that at the last")
        left.legend(frameon=False, fontsize=8)
        left.set_title("Before training: how far back it reaches")
        kinds = [
            ("Elman", "elman", 0.5, "none"),
            ("Elman, clipped", "elman", 0.5, "global"),
            ("LSTM", "lstm", 2.0, "none"),
        ]
        for i, (name, network, rate, clipping) in enumerate(kinds):
            chosen = rows[
                (rows["network"] == network)
                & (rows["learning_rate"] == rate)
                & (rows["clipping"] == clipping)
            ]
            for gain, of_gain in chosen.groupby("gain"):
                right.plot([gain] * len(of_gain), 100 * of_gain["test_accuracy"], "o^s"[i], color=COLORS[i],
                           label=name if gain == chosen["gain"].min() else None, alpha=0.7)  # fmt: skip
        right.set_xlabel("recurrent matrix: a rotation times")
        right.set_ylabel("accuracy after 300 steps, %")
        right.set_ylim(0, None)
        right.legend(frameon=False, fontsize=8)
        right.set_title("After training, every seed")
        title(figure, "Gradients through time")
        yield "recurrent", "Elman at a learning rate of 0.5, LSTM at 2", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        by = {
            "network": "network", "gain": "rotation times", "learning_rate": "learning rate",
            "clipping": "clipping",
        }  # fmt: skip
        more = {
            "largest norm": lambda chosen: f"{chosen['largest_norm'].astype(float).median():.3g}",
            "came to grief": lambda chosen: count_of(chosen, "trouble"),
        }
        yield outcomes(rows, "Recurrent networks", by, more)


def _reach(chosen: Rows) -> float:
    """What arrives at the first character, in the median."""
    return float(np.median([memory[0] for memory in chosen["memory"]]))
