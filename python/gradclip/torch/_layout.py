"""Where the tensors of a call lie: what this rank holds of each, and which process groups share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip.distributed._collective import open_group
from gradclip.torch._arguments import Names, Tensors, name_of
from gradclip.torch._dtensor import dtensor_type, local_part, without_partial
from gradclip.torch._norms import norm_dtype

__all__ = ["Layout", "ProcessGroups"]

ProcessGroups = tuple[ProcessGroup, ...]


@dataclass
class Layout:
    """How the tensors of one call lie on the ranks.

    Attributes:
        kind: What ranks count: "parameters" or "tensors".
        parts: What this rank holds of each, in the tensors' own memory.
        measured: The same, or a list with copies in the place of partial sums.
        labels: For each tensor the position of its set in ``sets``.
        sets: Process groups that tensors are sharded over; no group for those that every rank has whole.
        groups: All process groups with more than one rank that tensors lie on, sharded or replicated.
        is_spread: Whether there are several such groups, this rank in them or not: all ranks say the same.
        outside: The name of the first tensor whose mesh is without this rank.
        like: The first DTensor, as which the norm is returned.
        has_graph: Whether a DTensor requires grad.
        device: Of the first tensor.
        dtype: Of the norm.
    """

    kind: str
    parts: list[Tensor | None]
    measured: list[Tensor | None]
    labels: list[int]
    sets: list[ProcessGroups]
    groups: list[ProcessGroup]
    is_spread: bool = False
    outside: str | None = None
    like: Any = None
    has_graph: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, grads: Tensors, parameters: Sequence[Tensor], group: ProcessGroup | None, names: Names
    ) -> Layout:
        """Look at every tensor once, and add up partial sums.

        Args:
            grads: Plain tensors and DTensors.
            parameters: Stand in for gradients that are ``None``, so that every rank knows all sets; or
                empty.
            group: Of which all ranks hold shards in plain tensors; ``None`` if DTensors know where.
            names: What errors call the tensors.

        Raises:
            ValueError: A process group is not open; DTensors and a ``group``.
            UnsupportedGradientError: Partial values that are no sums.
        """
        kind = names.partition("[")[0] if isinstance(names, str) else "gradients"
        parts = list(grads)
        layout = cls(kind, parts, parts, [], [], [])
        joined = None if group is None else open_group(group)
        known = (
            [p if g is None else g for g, p in zip(grads, parameters, strict=True)] if parameters else grads
        )
        tensors = [tensor for tensor in known if isinstance(tensor, Tensor)]  # the rest is reported later
        layout.dtype = norm_dtype(tensors)
        if tensors:
            first: Any = tensors[0]
            layout.device = getattr(first, "_local_tensor", first).device
        layout._place(known, grads, names)
        if joined is not None:
            if layout.like is not None:
                raise ValueError("group: expected None for DTensors, which know their groups, got a group")
            layout.groups = [joined] if joined.size() > 1 else []
            layout.sets = [tuple(layout.groups)]
        return layout

    def sets_by_group(self) -> list[tuple[ProcessGroup, list[int]]]:
        """For every group that tensors are sharded over the sets that it is in: what it reduces together."""
        found = [
            (group, [i for i, groups in enumerate(self.sets) if _has(groups, group)]) for group in self.groups
        ]
        return [(group, sets) for group, sets in found if sets]

    def as_returned(self, total: Tensor) -> Tensor:
        """The norm as PyTorch returns it: on the first tensor's device, a DTensor if one was given."""
        local = total.to(self.device, self.dtype)
        if self.like is None:
            return local
        from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 (there are DTensors)

        mesh = self.like.device_mesh
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)

    def _place(self, known: Sequence[Any], grads: Tensors, names: Names) -> None:
        dtensor = dtensor_type()
        sets = _Sets()
        places: dict[Any, _Place] = {}  # models have thousands of tensors and few ways to lie
        sums: dict[int, Tensor] = {}
        for i, (tensor, grad) in enumerate(zip(known, grads, strict=True)):
            if dtensor is None or not isinstance(tensor, dtensor):
                self.labels.append(sets.number(()))
                continue
            spec: Any = tensor._spec
            key = (id(spec.mesh), spec.placements)
            place = places.get(key)
            if place is None:
                place = places[key] = sets.place(tensor, name_of(names, i))
                self.like = tensor if self.like is None else self.like
            self.labels.append(place.label)
            if grad is not None:
                self.parts[i] = local_part(grad)
                self.has_graph = self.has_graph or grad.requires_grad
                if place.is_partial:
                    sums[i] = local_part(without_partial(grad, name_of(names, i)))
        if sums:
            self.measured = [sums.get(i, part) for i, part in enumerate(self.parts)]
        self.sets, self.groups = sets.found, list(sets.groups.values())
        self.is_spread, self.outside = sets.is_spread or len(self.groups) > 1, sets.outside


class _Place(NamedTuple):
    label: int
    is_partial: bool


class _Sets:
    """The sets of process groups that tensors were found to be sharded over."""

    def __init__(self) -> None:
        self.found: list[ProcessGroups] = []
        self.groups: dict[str, ProcessGroup] = {}
        self.is_spread = False
        self.outside: str | None = None
        self._numbers: dict[tuple[str, ...], int] = {}

    def number(self, groups: ProcessGroups) -> int:
        key = tuple(group.group_name for group in groups)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            self.found.append(groups)
        return self._numbers[key]

    def place(self, tensor: Any, name: str) -> _Place:
        """Where the tensors of this mesh and these placements lie."""
        mesh = tensor.device_mesh
        if mesh.get_coordinate() is None:
            self.outside = self.outside or name
            self.is_spread = self.is_spread or mesh.size() > 1
            return _Place(self.number(()), False)
        sharded: list[ProcessGroup] = []
        for dim, placement in enumerate(tensor.placements):
            group = _mesh_group(mesh, dim, name)
            if group.size() == 1:
                continue
            self.groups[group.group_name] = group
            if not placement.is_replicate() and not placement.is_partial():
                sharded.append(group)
        return _Place(self.number(tuple(sharded)), any(p.is_partial() for p in tensor.placements))


def _has(groups: ProcessGroups, group: ProcessGroup) -> bool:
    return any(each.group_name == group.group_name for each in groups)


def _mesh_group(mesh: Any, dim: int, name: str) -> ProcessGroup:
    """The group of a dimension of a mesh."""
    try:
        group = mesh.get_group(dim)
    except (RuntimeError, ValueError):  # by name, which a group loses when it is destroyed
        raise ValueError(
            f"{name}: expected a mesh of open process groups, got {mesh} with one that was destroyed"
        ) from None
    return open_group(group, name)
