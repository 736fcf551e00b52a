"""Clusters of Ray: joins or starts one and shares it out among actors; gives them no work."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from vitviz.errors import ClusterError, DeviceError, OptionError, first_line

__all__ = ["Actors", "joined", "require_ray", "shared_out"]

_CORES = 4  # of an actor: with more, drawing and writing wait for Python's lock
_STORE = 1 << 30  # bytes of shared memory: keys, the model and records are all that is in there


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Who does the work.

    Attributes:
        count: How many actors.
        cores: Of each; its threads.
        on_gpu: Whether each has a GPU.
    """

    count: int
    cores: int
    on_gpu: bool = False

    @property
    def device(self) -> str:
        """Where each has its model."""
        return "cuda" if self.on_gpu else "cpu"

    def __str__(self) -> str:
        """Say how many there are, and what each has."""
        actors = "1 actor" if self.count == 1 else f"{self.count} actors, each"
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{actors} with {'a GPU and ' * self.on_gpu}{cores}"


def require_ray() -> None:
    """Make sure that Ray can be imported, without importing it.

    Raises:
        OptionError: It is not installed, or without what its data sets need.
    """
    for package in ("ray", "pyarrow"):
        if find_spec(package) is None:
            raise OptionError(
                f"--engine ray needs {package}, which is not installed; "
                "try pip install 'vitviz[ray]'"
            )


@contextmanager
def joined(address: str | None, count: int | None, device: str) -> Iterator[Actors]:
    """Join a cluster, or start one on this machine, until the work is done.

    Args:
        address: ``auto``, or that of a cluster; None: as ``RAY_ADDRESS`` says, else a new one.
        count: How many actors are wanted; None: as many as suit.
        device: ``auto``, ``cpu`` or ``cuda``.

    Yields:
        How the cluster is shared out.

    Raises:
        ClusterError: There is no such cluster.
        OptionError: It has less than is asked for.
        DeviceError: It has no GPU.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    ray = _quiet_ray()
    own = {"include_dashboard": False, "object_store_memory": _STORE}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _hushed():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **(own if address == "local" else {}),
            )
    except Exception as error:  # of many kinds, by what is wrong with the address
        where = "of its own cannot be started" if address == "local" else f"{address} is not there"
        raise ClusterError(
            f"a cluster {where}: {first_line(error)}; start one with ray start --head"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray takes it over; it is the command's
    try:
        nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
        yield shared_out(nodes, count, device)
    finally:
        ray.shutdown()  # ends all actors


def shared_out(nodes: Sequence[Mapping[str, float]], count: int | None, device: str) -> Actors:
    """Share a cluster out among actors: one for each GPU, else one for every few cores.

    Args:
        nodes: The resources of each of its machines, ``CPU`` and ``GPU`` among them.
        count: How many actors are wanted; None: as many as suit.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        OptionError: It has less than is asked for, or the device is no word for all its machines.
        DeviceError: It has no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device is {device!r}; with --engine ray, give auto, cpu or cuda")
    cores = [int(each.get("CPU", 0)) for each in nodes]
    gpus = [int(each.get("GPU", 0)) for each in nodes]
    if device == "cuda" and not any(gpus):
        raise DeviceError("--device is cuda, but the cluster has no GPU; give cpu or auto")
    if any(gpus) and device != "cpu":
        actors = _at_most(count, sum(gpus), "GPUs")
        each = min(mine // its for mine, its in zip(cores, gpus, strict=True) if its)
        return Actors(count=actors, cores=max(1, each), on_gpu=True)
    most = _at_most(count, sum(cores), "cores")
    if count is None:
        each = min(_CORES, max(cores))  # one small machine must not make all actors small
        return Actors(count=sum(mine // each for mine in cores), cores=each)
    whole = range(max(cores), 0, -1)
    each = next(size for size in whole if sum(mine // size for mine in cores) >= most)
    return Actors(count=count, cores=each)


def _at_most(count: int | None, most: int, what: str) -> int:
    if most < (count or 1):
        raise OptionError(
            f"--actors is {count or 'auto'}, but the cluster has {most} {what}; give a number "
            f"from 1 to {most}"
        )
    return count or most


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep off stderr what is written there past Python, as Ray's core does when it starts."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet_ray() -> Any:
    """Import Ray so that it says nothing: our stdout has results only, and stderr is ours, too."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data  # which sets up its own log when it is imported
    except ImportError as error:
        raise OptionError(
            f"--engine ray cannot import Ray: {first_line(error)}; try pip install 'vitviz[ray]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # No public switch keeps the deaths of workers off stdout.
    ray._private.worker._worker_logs_enabled = False
    return ray
