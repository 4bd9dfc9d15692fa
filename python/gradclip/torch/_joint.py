"""Ranks that do something together: what they reduce, and what they report to each other.

A rank where something is wrong takes part all the same and says so; then all ranks raise the same error. None
is left waiting, and nothing was written.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip.distributed._collective import device_for, reduced
from gradclip.torch._gradients import UnsupportedGradientError
from gradclip.torch._layout import Layout

__all__ = ["Joint", "Report"]

# Errors that another rank can raise as well; of several the first that fits.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UnsupportedGradientError, TypeError, ValueError, RuntimeError)
}


class Report(NamedTuple):
    """What a rank reports to the others when something is wrong."""

    tensors: int  # how many it has
    failure: tuple[str, str] | None = None  # the class and the text of its error
    nonfinite: tuple[str, ...] = ()  # what there is to say of tensors that are not finite
    layout: str = ""  # how they lie and what is done with them, which has to be the same on all ranks

    def failed(self, error: Exception) -> Report:
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
        return self._replace(failure=(kind, str(error)))


class Joint:
    """The reductions of one call, and what the ranks have reported to each other.

    Args:
        layout: Where the tensors lie.
        own: This rank's report.
        order: Of the norm whose sums are reduced.
        may_wait: Whether the host may look at numbers on a GPU.
    """

    def __init__(self, layout: Layout, own: Report, order: float, may_wait: bool) -> None:
        self._order = order
        self._may_wait_anywhere = may_wait
        self._layout = layout
        self._own = own
        self._rank = dist.get_rank() if layout.groups else 0
        self._reports = {self._rank: own}

    def totals(self, sums: Tensor) -> Tensor:
        """The sums (maxima) over the groups of each set of one number of each rank."""
        for group, sets in self._layout.sets_by_group():
            there = device_for(group, sums.device)
            count = self._own.tensors
            failed = self._has_failed()
            # If and only if all n counts c are equal, n times the sum of c^2 is the square of the sum of c
            # (Cauchy-Schwarz); of maxima, if that of c and that of -c cancel.
            beside = [failed, count, -count if math.isinf(self._order) else count * count]
            # Filled in, not copied there, which would wait for a GPU.
            message = torch.stack([*sums[sets], *(sums.new_full((), number) for number in beside)])
            message = reduced(message.to(there), self._order, group)
            first, second = message[-2:].to(torch.int64)
            if math.isinf(self._order):
                is_wrong = (message[-3] > 0) | (first != -second)
            else:
                is_wrong = (message[-3] > 0) | (group.size() * second != first * first)
            joined = message[:-3].to(sums.device)
            if not self._may_wait(there):
                joined = joined.masked_fill(is_wrong.to(sums.device), math.nan)
            elif is_wrong or (self._may_wait_anywhere and not joined.isfinite().all()):
                self._tell(group)  # All ranks of the group have seen the same numbers.
            sums = sums.clone()
            sums[sets] = joined
        return sums

    def meet(self) -> None:
        """Find out, before anything is reduced, whether a rank has failed or does something else."""
        digest = int.from_bytes(hashlib.sha256(self._own.layout.encode()).digest()[:7], "big")
        for group in self._layout.groups:
            mine = [self._has_failed(), self._own.tensors, -self._own.tensors, digest, -digest]
            there = device_for(group, torch.device("cpu"))
            message = torch.tensor(mine, dtype=torch.int64).to(there)
            dist.all_reduce(message, dist.ReduceOp.MAX, group)
            failed, count, minus_count, greatest, minus_least = message.tolist()
            if failed or count != -minus_count or greatest != -minus_least:
                self._tell(group)

    def _may_wait(self, device: torch.device) -> bool:
        """Whether the host may look at numbers there."""
        return device.type == "cpu" or self._may_wait_anywhere

    def agreed(self, total: Tensor) -> Tensor:
        """The number that all ranks have; of several that differ in the last bits, the greatest.

        Where several groups have reduced the same numbers, each may have done so in an order of its own.
        Groups that no sum went through (of replicas) hear here of what is wrong with another's.
        """
        groups = self._layout.groups
        if self._layout.is_spread or (groups and not any(self._layout.sets)):
            for group in groups:
                there = device_for(group, total.device)
                message = torch.stack([total, total.new_full((), self._has_failed())]).to(there)
                message = reduced(message, math.inf, group)
                total, is_wrong = message[0].to(total.device), message[1] > 0
                if not self._may_wait(there):
                    total = total.masked_fill(is_wrong.to(total.device), math.nan)
                elif is_wrong:
                    self._tell(group)
        return total

    def _has_failed(self) -> bool:
        """Whether this rank knows of an error, its own or another's."""
        reports = self._reports.values()
        alike = {(report.tensors, report.layout) for report in reports}
        return len(alike) > 1 or any(report.failure for report in reports)

    def check(self, error: Exception | None) -> None:
        """Raise what a rank failed with (this one: with ``error``); or that ranks disagree."""
        if error is not None and len(self._reports) == 1:
            raise error  # The others do not know.
        failures = [
            (rank, *report.failure) for rank, report in sorted(self._reports.items()) if report.failure
        ]
        if failures:
            text = "; ".join(f"rank {rank}: {text}" for rank, _, text in failures)
            raise _KINDS[failures[0][1]](text) from error
        ranks: dict[int, list[int]] = {}
        for rank, report in sorted(self._reports.items()):
            ranks.setdefault(report.tensors, []).append(rank)
        if len(ranks) > 1:
            got = "; ".join(f"{count} on rank {', '.join(map(str, who))}" for count, who in ranks.items())
            raise ValueError(
                f"{self._layout.kind}: expected the same number of tensors on every rank, got {got}; "
                "nothing was written"
            )
        if len({report.layout for report in self._reports.values()}) > 1:
            raise ValueError(
                f"{self._layout.kind}: expected the same call with the same dtypes, placements and groups on "
                "every rank, got different ones; nothing was written"
            )

    def nonfinite(self) -> list[str]:
        """What the ranks have to say of their tensors that are not finite."""
        return [
            f"rank {rank}: {text}" if self._layout.groups else text
            for rank, report in sorted(self._reports.items())
            for text in report.nonfinite
        ]

    def _tell(self, group: ProcessGroup) -> None:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, self._reports, group)
        for reports in told:
            self._reports.update(reports)
