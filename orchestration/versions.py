"""What runs here: `latentzoom --version`."""

from __future__ import annotations

from importlib import metadata


def versions() -> dict[str, str]:
    """Of latentzoom, torch and Ray ("none" where it is not installed), and the device that computes."""
    import torch

    found = {"latentzoom": metadata.version("latentzoom"), "torch": str(torch.__version__)}
    try:
        found["Ray"] = metadata.version("ray")
    except metadata.PackageNotFoundError:
        found["Ray"] = "none"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["device"] = f"cuda ({len(names)} × {names[0]})" if len(set(names)) == 1 else f"cuda ({', '.join(names)})"
    else:
        found["device"] = f"cpu ({torch.get_num_threads()} threads)"
    return found
