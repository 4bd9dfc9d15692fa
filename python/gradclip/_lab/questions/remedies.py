"""Which remedy works when: every remedy against every trouble."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from gradclip._lab.experiment import Settings
from gradclip._lab.questions._base import (
    CALM,
    HOT,
    LEARNT,
    Question,
    Rows,
    listed,
    outcomes,
    percent,
    seeds,
)
from gradclip._lab.questions.grids import grid
from gradclip._report.style import Plot
from gradclip._report.tables import ReportTable

__all__ = ["Remedies"]

_TROUBLES = {
    "learning rate too high": HOT,
    "weights too large": replace(CALM, initialisation="too large"),
    "weights near zero": replace(HOT, initialisation="near zero", learning_rate=0.01),
    "40 layers": replace(HOT, depth=40, learning_rate=0.01),
    "sigmoid, 20 layers": replace(HOT, activation="sigmoid", initialisation="xavier"),
    "recurrent, 40 steps back": Settings(
        network="elman", activation="tanh", initialisation="orthogonal", gain=1.5, learning_rate=0.5
    ),
}
_REMEDIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "clip the global norm": {"clipping": "global"},
    "clip values": {"clipping": "value"},
    "AGC": {"clipping": "agc"},
    "ZClip": {"clipping": "zclip"},
    "AutoClip": {"clipping": "autoclip"},
    "a tenth of the learning rate": {"learning_rate": 10},  # the divisor
    "warm-up": {"schedule": "warm-up"},
    "cosine": {"schedule": "cosine"},
    "L2": {"regularisation": "l2"},
    "L1": {"regularisation": "l1"},
    "weights of He": {"initialisation": "he", "gain": 1.0},
    "orthogonal weights": {"initialisation": "orthogonal", "gain": 1.0},
    "tanh": {"activation": "tanh"},
    "ReLU": {"activation": "relu"},
    "leaky ReLU": {"activation": "leaky relu"},
    "layer norm": {"normalisation": "layer"},
    "batch norm": {"normalisation": "batch"},
    "residual layers": {"network": "residual"},
    "LSTM": {"network": "lstm"},
}


_FEW = (
    "nothing", "clip the global norm", "AGC", "a tenth of the learning rate", "orthogonal weights", "tanh",
    "batch norm", "residual layers", "LSTM",
)  # fmt: skip


class Remedies(Question):
    """The matrix."""

    name = "remedies"
    title = "Which remedy works when?"
    background = (
        "Six networks in trouble, and what the textbooks prescribe, one remedy at a time; nothing else is "
        f"changed. A run has learnt if it recognises {percent(LEARNT['digits'])} of the digits (or, of the "
        f"recurrent network, {percent(LEARNT['text'])} of the characters)."
    )

    def design(self, quick: bool) -> list[Settings]:
        return seeds([one for _, remedy, one in _cells() if remedy in _FEW or not quick], quick)

    def answer(self, rows: Rows) -> list[str]:
        found = _named(rows)
        share = found.groupby(["trouble_is", "remedy"])["learnt"].mean()
        sentences = []
        for trouble in _TROUBLES:
            working = [
                remedy
                for remedy in _REMEDIES
                if remedy != "nothing" and share.get((trouble, remedy), 0.0) > 0.5
            ]
            by_itself = share[trouble, "nothing"]
            sentences.append(
                f"{trouble[0].upper()}{trouble[1:]} (by itself {percent(by_itself)} of the runs learn): "
                + (
                    f"{listed(working)} made more than half of them learn."
                    if working
                    else "no single remedy helped."
                )
            )
        helps = {
            remedy: sum(share.get((trouble, remedy), 0.0) > 0.5 for trouble in _TROUBLES)
            for remedy in _REMEDIES
        }
        best = [remedy for remedy in _REMEDIES if helps[remedy] == max(helps.values())]
        clip = helps["clip the global norm"]
        sentences.insert(
            0,
            f"No remedy works always. Most often: {listed(best)}, in {max(helps.values())} of "
            f"{len(_TROUBLES)} troubles; clipping the global norm in {clip}. Clipping bounds the step; it "
            "cannot bring back a gradient that has vanished.",
        )
        return sentences

    def plots(self, rows: Rows) -> Iterator[Plot]:
        figure = grid(
            _named(rows),
            "remedy",
            "trouble_is",
            "steps",
            {300: ""},
            "Accuracy in %, by trouble and remedy",
            by_share=True,
        )
        yield (
            "remedies",
            "Light: all seeds learnt; dark: none did. Blank: the remedy is what there is, or makes no sense",
            figure,
        )

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        yield outcomes(_named(rows), "Remedies", {"trouble_is": "trouble", "remedy": "remedy"})


def _cells() -> Iterator[tuple[str, str, Settings]]:
    """Trouble, remedy, run: where the remedy changes something that the network has."""
    for trouble, base in _TROUBLES.items():
        for remedy, more in _REMEDIES.items():
            changed = dict(more)
            if "learning_rate" in changed:
                changed["learning_rate"] = base.learning_rate / changed["learning_rate"]
            settings = replace(base, **changed)
            recurrent = base.network == "elman"
            fits = changed.get("network", base.network) in (
                ("elman", "lstm") if recurrent else ("mlp", "residual")
            ) and not (recurrent and "normalisation" in changed)
            if fits and (settings != base or not more):
                yield trouble, remedy, settings


def _named(rows: Rows) -> Rows:
    """The rows of every cell, with its names: a run may be in more than one."""
    names = list(Settings.names())
    by_run = {
        tuple(row[name] for name in names if name != "seed"): group for row, group in _groups(rows, names)
    }
    parts = []
    for trouble, remedy, settings in _cells():
        varied = settings.varied()
        group = by_run.get(tuple(varied[name] for name in names if name != "seed"))
        if group is not None:
            parts.append(group.assign(trouble_is=trouble, remedy=remedy))
    return pd.concat(parts)


def _groups(rows: Rows, names: list[str]) -> Iterator[tuple[dict[str, Any], Rows]]:
    keys = [name for name in names if name != "seed"]
    for key, group in rows.groupby(keys, sort=False):
        yield dict(zip(keys, key, strict=True)), group
