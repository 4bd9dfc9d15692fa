"""Where numbers of steps go: to files, and to loggers, each through its own library."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from gradclip.monitor._alerts import Alert

__all__ = ["CsvWriter", "JsonlWriter", "MlflowWriter", "TensorBoardWriter", "WandbWriter"]

_Numbers = dict[str, float | int | bool]


class JsonlWriter:
    """A line of JSON for each step: its numbers, and its alerts.

    NaN and infinities are written as ``null``, for JSON has none.

    Args:
        path: The file; what is there is kept, and written on after.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, numbers: _Numbers, alerts: Sequence[Alert]) -> None:
        """Write a step."""
        line: dict[str, Any] = {"step": step}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if alerts:
            line["alerts"] = [alert.as_dict() for alert in alerts]
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CsvWriter:
    """A row for each step, a column for each number of the first step; the last has the alerts.

    Args:
        path: The file, which is begun anew.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = Path(path).open("w", encoding="utf-8", newline="")  # noqa: SIM115
        self._rows: csv.DictWriter[str] | None = None

    def write(self, step: int, numbers: _Numbers, alerts: Sequence[Alert]) -> None:
        """Write a step. Numbers that the first one did not have are left out."""
        if self._rows is None:
            columns = ["step", *numbers, "alerts"]
            self._rows = csv.DictWriter(self._file, columns, restval="", extrasaction="ignore")
            self._rows.writeheader()
        said = "; ".join(f"{alert.kind}: {alert.message}" for alert in alerts)
        self._rows.writerow({"step": step, **numbers, "alerts": said})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars under ``gradclip/…`` and alerts as text, by the ``SummaryWriter`` of PyTorch.

    Args:
        to: A directory, or a ``torch.utils.tensorboard.SummaryWriter`` that is there already (and stays
            open).
    """

    def __init__(self, to: Any) -> None:
        self._owns = isinstance(to, str | Path)
        if self._owns:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an extra)

            to = SummaryWriter(str(to))
        self._to = to

    def write(self, step: int, numbers: _Numbers, alerts: Sequence[Alert]) -> None:
        """Write a step."""
        for name, value in numbers.items():
            self._to.add_scalar(f"gradclip/{name}", value, step)
        for alert in alerts:
            self._to.add_text(f"gradclip/{alert.kind}", f"{alert}. {alert.advice}", step)

    def close(self) -> None:
        """Flush, and close what was opened here."""
        self._to.close() if self._owns else self._to.flush()


class WandbWriter:
    """Numbers under ``gradclip/…``, alerts as those of Weights & Biases.

    Args:
        run: What ``wandb.init()`` returned; also offline.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, numbers: _Numbers, alerts: Sequence[Alert]) -> None:
        """Write a step."""
        # Not as a step of the run, which has others who log in it.
        row: dict[str, Any] = {f"gradclip/{name}": value for name, value in numbers.items()}
        row["gradclip/step"] = step
        if alerts:
            row["gradclip/alerts"] = "; ".join(map(str, alerts))
        self._run.log(row)
        for alert in alerts:
            if alert.is_warning:
                self._run.alert(title=f"gradclip: {alert.kind}", text=f"{alert}. {alert.advice}")

    def close(self) -> None:
        """The run stays open: it is the caller's."""


class MlflowWriter:
    """Metrics under ``gradclip/…`` of an MLflow run; alerts as its tags.

    Args:
        run_id: Of the run; by default the one that is active.
    """

    def __init__(self, run_id: str | None = None) -> None:
        from mlflow import MlflowClient, active_run  # noqa: PLC0415 (an extra)

        if run_id is None:
            run = active_run()
            if run is None:
                raise ValueError("run_id: expected one, or an active run (mlflow.start_run()), got neither")
            run_id = run.info.run_id
        self._client, self._run_id = MlflowClient(), run_id

    def write(self, step: int, numbers: _Numbers, alerts: Sequence[Alert]) -> None:
        """Write a step, in one request."""
        from mlflow.entities import Metric, RunTag  # noqa: PLC0415

        now = int(1000 * time.time())
        metrics = [
            Metric(f"gradclip/{_name(name)}", float(value), now, step) for name, value in numbers.items()
        ]
        tags = [RunTag(f"gradclip.{alert.kind}.{step}", f"{alert}. {alert.advice}") for alert in alerts]
        for first in range(0, max(len(metrics), 1), _MOST_METRICS):
            batch = metrics[first : first + _MOST_METRICS]
            self._client.log_batch(self._run_id, batch, tags=[] if first else tags)

    def close(self) -> None:
        """The run stays open: it is the caller's."""


_MOST_METRICS = 1000  # that MLflow takes in one request


def _name(name: str) -> str:
    """With the characters that MLflow takes in names."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
