"""Container files: the image of every Ray node, and the tracking server's."""

from __future__ import annotations

from orchestration.infra.values import HEADER, Values


def dockerfile(values: Values) -> str:
    """CUDA base, locked packages, torch chosen apart from the lock, a user that is not root."""
    image = values.image
    return f"""{HEADER}# From the repository's root:  docker build -f infra/Dockerfile -t {image.name} .
# For another CUDA build:      --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
FROM {image.cuda}
ARG TORCH="{image.torch}"
ARG TORCH_INDEX="{image.torch_index}"
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \\
    && apt-get install -y --no-install-recommends \\
       python3 python3-venv python3-dev build-essential rsync openssh-client \\
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid {image.user} --shell /bin/bash latentzoom
ENV VIRTUAL_ENV=/opt/latentzoom PATH=/opt/latentzoom/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV
# The layers that change least come first: torch, then the locked packages, then this project.
RUN pip install --index-url "$TORCH_INDEX" "$TORCH"
COPY requirements.lock /build/
RUN pip install --no-deps -r /build/requirements.lock {" ".join(values.ray_up.packages)}
COPY pyproject.toml README.md LICENSE /build/
COPY pipeline /build/pipeline
COPY preprocess /build/preprocess
COPY training /build/training
COPY orchestration /build/orchestration
RUN pip install --no-deps --no-build-isolation /build && rm -rf /build && latentzoom --version
ENV RAY_AUTH_MODE=token PYTHONUNBUFFERED=1
USER {image.user}
WORKDIR /home/latentzoom
CMD ["latentzoom", "--help"]
"""


def dockerignore() -> str:
    """Only what the image is made of reaches the builder."""
    rooms = "".join(f"!{name}\n" for name in ("pipeline", "preprocess", "training", "orchestration"))
    return f"{HEADER}*\n{rooms}!pyproject.toml\n!README.md\n!LICENSE\n!requirements.lock\n**/__pycache__\n"


def tracking_dockerfile(values: Values) -> str:
    """MLflow with authentication, PostgreSQL and S3."""
    versions = values.tracking
    return f"""{HEADER}FROM {versions.python_image}
RUN pip install --no-cache-dir "mlflow[auth]=={versions.mlflow}" psycopg2-binary=={versions.psycopg2} \\
    boto3=={versions.boto3} \\
    && useradd --create-home --uid {values.image.user} mlflow \\
    && mkdir /auth && chown {values.image.user} /auth
COPY basic_auth.ini /etc/mlflow/basic_auth.ini
ENV MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic_auth.ini MLFLOW_DISABLE_TELEMETRY=true
USER {values.image.user}
"""
