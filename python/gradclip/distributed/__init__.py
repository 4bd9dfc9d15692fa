"""Gradients spread over processes: what joins the processes' sums, for ``reduce=``.

The clipping functions of gradclip hand the sums of this process (of squares, of magnitudes for ``ord=1``,
of p-th powers; maxima for ``inf``) to ``reduce``, and go on with what comes back. Here are the two that
most people need, on PyTorch's process groups and on MPI. :mod:`gradclip.torch` has drop-ins that need
neither; see ``docs/scaling.md``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from gradclip import _core

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Reduction", "mpi", "process_group"]

_Reduce: TypeAlias = Callable[[Any], Any]


class Reduction:
    """What joins sums of one order; the clipping functions refuse it for another.

    Attributes:
        ord: The order that it was made for.
    """

    __slots__ = ("_join", "ord")

    def __init__(self, join: _Reduce, ord: float) -> None:
        self._join = join
        self.ord = ord

    def __call__(self, sums: Any) -> Any:
        """The sums of all processes."""
        saved = _core.enter_float_environment()
        try:
            return self._join(sums)
        finally:
            _core.leave_float_environment(saved)

    def __repr__(self) -> str:
        return f"Reduction(ord={self.ord:g})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Reduction: expected no copy and no pickle of it: its processes are those it was made with"
        )


def process_group(group: ProcessGroup | None = None, ord: float = 2) -> Reduction:
    """Join sums over a process group of ``torch.distributed``: one all-reduce of float64 numbers.

    The sums of a GPU are reduced there, without the host, if the group has a backend for it (NCCL has).
    All ranks of the group must make the same call, with as many groups of gradients: a rank that does
    not lets the others wait until the timeout of the group.

    Args:
        group: A process group with this rank in it; ``None``: the default one at the time of the call.
        ord: The ``ord`` of the call that this is for, which refuses another: for ``inf`` the greatest is
            taken, else the sum.

    Returns:
        What the clipping functions take as ``reduce``. It takes NumPy arrays and returns such; of arrays
        on a GPU, CuPy's or torch's, torch tensors there.

    Raises:
        TypeError: ``group`` is no process group; ``ord`` is no number.
        ValueError: ``ord`` is not positive. When called: the group is not open any more, or this rank is
            not in it.

    Example:
        >>> import gradclip.distributed, numpy as np, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # alone
        >>> grads = [np.array([3.0, 4.0])]
        >>> reduce = gradclip.distributed.process_group()
        >>> gradclip.clip_by_global_norm_(grads, 1.0, reduce=reduce).group_norms
        array([5.])
        >>> dist.destroy_process_group()
    """
    import gradclip.torch  # noqa: F401, PLC0415 (says what to install where there is no PyTorch)
    from gradclip.distributed._collective import device_for, open_group, reduced  # noqa: PLC0415 (optional)

    order = _order(ord)
    import torch  # noqa: PLC0415
    from torch.utils.dlpack import from_dlpack  # noqa: PLC0415

    if group is not None:
        open_group(group)

    def reduce(sums: Any) -> Any:
        joined = open_group(group)
        on_host = isinstance(sums, np.ndarray)
        own = sums if isinstance(sums, torch.Tensor) else from_dlpack(sums)
        home = own.device
        values = own.to(device_for(joined, home), copy=True)
        total = reduced(values, order, joined).to(home)
        return total.numpy() if on_host else total

    return Reduction(reduce, order)


def mpi(comm: Any, ord: float = 2) -> Reduction:
    """Join sums over an MPI communicator of mpi4py: one ``Allreduce`` of float64 numbers.

    The sums of a GPU go through the host, whatever the MPI library can do: that waits for the device.
    All ranks must make the same call, as for :func:`process_group`.

    Args:
        comm: An ``mpi4py.MPI.Intracomm``.
        ord: As for :func:`process_group`.

    Returns:
        What the clipping functions take as ``reduce``.

    Raises:
        TypeError: ``comm`` is no communicator; ``ord`` is no number.
        ValueError: ``ord`` is not positive; ``comm`` is closed (also when called).

    Example:
        As every rank runs it, under ``mpiexec``::

            from mpi4py import MPI

            reduce = gradclip.distributed.mpi(MPI.COMM_WORLD)
            gradclip.clip_by_global_norm_(grads, 1.0, reduce=reduce)
    """
    try:
        from mpi4py import MPI  # noqa: PLC0415 (optional, and importing it starts MPI)
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        raise ModuleNotFoundError(
            "gradclip.distributed.mpi: expected mpi4py to be installed: pip install mpi4py", name="mpi4py"
        ) from None

    order = _order(ord)
    if not isinstance(comm, MPI.Intracomm):
        got = f"{type(comm).__module__}.{type(comm).__qualname__}"
        raise TypeError(f"comm: expected an mpi4py.MPI.Intracomm, got a {got}")

    def check_open() -> None:
        if comm == MPI.COMM_NULL:
            raise ValueError("comm: expected an open communicator, got MPI.COMM_NULL: it was freed")

    def reduce(sums: Any) -> Any:
        check_open()
        values = _on_host(sums)
        if not math.isinf(order):
            comm.Allreduce(MPI.IN_PLACE, values, op=MPI.SUM)
            return _where(sums, values)
        # A maximum may lose a NaN, so whether there was one is reduced beside it.
        is_nan = np.isnan(values)
        message = np.stack([np.where(is_nan, 0.0, values), is_nan.astype(np.float64)])
        comm.Allreduce(MPI.IN_PLACE, message, op=MPI.MAX)
        return _where(sums, np.where(message[1] > 0, math.nan, message[0]))

    check_open()
    return Reduction(reduce, order)


def _on_host(sums: Any) -> Any:
    """A copy, as a NumPy array."""
    if isinstance(sums, np.ndarray):
        return sums.copy()
    return np.array(sums.cpu() if hasattr(sums, "new_tensor") else sums.get())


def _where(sums: Any, values: Any) -> Any:
    """NumPy numbers as an array of the kind, and on the device, of the sums."""
    if isinstance(sums, np.ndarray):
        return values
    return sums.new_tensor(values) if hasattr(sums, "new_tensor") else sys.modules["cupy"].asarray(values)


def _order(ord: float) -> float:
    try:
        order = float(ord)
    except (TypeError, ValueError):
        raise TypeError(f"ord: expected a number, got {ord!r}") from None
    if not order > 0:
        raise ValueError(f"ord: expected a positive number, got {ord!r}")
    return order
