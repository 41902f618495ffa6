"""Processes on several hosts that train one model."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils


@dataclass(frozen=True)
class DistributedOptions:
    """Options of a program that runs on several hosts."""

    distributed: str | None = None
    """Run on several hosts: auto on TPU pods, SLURM, Open MPI and Kubernetes, else HOST:PORT of
    process 0."""
    processes: int | None = None
    """Number of processes, with HOST:PORT."""
    process: int | None = None
    """Index of this process, from 0, with HOST:PORT."""


def initialize_distributed(options: DistributedOptions) -> None:
    """Call `jax.distributed.initialize` in every process, before devices are used.

    It does nothing without an address. The address "auto" is for environments that JAX can read:
    TPU pods, SLURM, Open MPI and Kubernetes.

    Raises: ValueError for options that contradict each other, or processes that cannot connect.
    """
    address, processes, process = options.distributed, options.processes, options.process
    if address in (None, "auto") and (processes, process) != (None, None):
        raise ValueError(
            f"processes is {processes} and process is {process}, and distributed is {address}: they"
            " belong to HOST:PORT"
        )
    if address is None:
        return
    if address == "auto":
        _initialize_auto()
        return
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"distributed is {address!r}: use auto, or the HOST:PORT of process 0")
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(
            f"processes is {processes} and process is {process}: use their number, and the index of"
            " this one, from 0"
        )
    try:
        jax.distributed.initialize(address, processes, process)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"distributed is {address}: the processes could not connect ({reason})"
        ) from error


def first_process_first(name: str, prepare: Callable[[], Any]) -> Any:
    """The result of a function, which process 0 calls before the others do.

    What it writes may be on a disk that all share. name: of the wait, the same in all processes.
    """
    is_first = jax.process_index() == 0
    if not is_first:
        multihost_utils.sync_global_devices(name)
    result = prepare()
    if is_first and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
    return result


def _initialize_auto() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "distributed is auto, and this is no TPU pod, SLURM, Open MPI or Kubernetes job: use"
            " HOST:PORT of process 0, with processes and process"
        ) from error
