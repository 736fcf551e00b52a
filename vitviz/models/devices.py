"""The device that a model runs on."""

from __future__ import annotations

import torch

from vitviz.errors import DeviceError

__all__ = ["describe_device", "select_device"]


def select_device(device: str = "auto") -> torch.device:
    """Pick the device: cuda, then mps, then cpu, or as told.

    Raises:
        DeviceError: The device asked for is not on this machine.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}
    if chosen.type not in counts:
        raise DeviceError(f"--device {device!r} is unknown; use auto, cpu, cuda, cuda:1 or mps")
    if (chosen.index or 0) >= counts[chosen.type]:
        has = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise DeviceError(f"--device {device} is not on this machine, which has: {has}")
    return chosen


def describe_device(device: torch.device) -> str:
    """Say which device is used: "Using cuda (NVIDIA …)" or "Using cpu"."""
    if device.type == "cuda":
        return f"Using {device} ({torch.cuda.get_device_name(device)})"
    return f"Using {device}"
