# The server for GPU nodes. The base image contains the tritonserver, Python 3.12 and CUDA 13 (driver 580 or later).
# As outside containers, autoglm_launcher installs the packages and starts the server.
# 26.04 is the first release whose readiness detects a dead model process and whose ensembles survive a full queue.
FROM nvcr.io/nvidia/tritonserver:26.04-py3

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libpython3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/autoglm
COPY pyproject.toml LICENSE ./
COPY constraints ./constraints
COPY client ./client
COPY autoglm_launcher ./autoglm_launcher
COPY autoglm/__init__.py ./autoglm/__init__.py
# Before the rest is copied, so that a change to the code does not reinstall the packages.
RUN PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1 python3 -m autoglm_launcher.venv --no-server gateway

COPY autoglm ./autoglm
COPY gateway ./gateway
COPY model_repository ./model_repository
COPY presets ./presets
COPY autoglm-config.yaml ./
COPY demo/samples ./demo/samples
COPY demo/speech/samples ./demo/speech/samples

# Caches that a volume persists: kernels compiled at run time (with gcc), and quantised weights.
ENV XDG_CACHE_HOME=/var/cache/autoglm \
    AUTOGLM_CACHE=/var/cache/autoglm/weights \
    TRITON_CACHE_DIR=/var/cache/autoglm/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/autoglm/inductor \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    AUTOGLM_CHECKPOINT=/checkpoint
# The base image's unprivileged user, triton-server.
RUN install -d -o 1000 -g 1000 /var/cache/autoglm
USER 1000:1000

EXPOSE 8000 8001 8002 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=60s --start-period=30m --retries=3 \
    CMD ["/opt/autoglm/.venv/bin/python", "-m", "autoglm_launcher.probe", "--gateway", "127.0.0.1:8080"]
ENTRYPOINT ["/opt/autoglm/.venv/bin/python", "-m", "autoglm_launcher", \
    "--tritonserver", "/opt/tritonserver/bin/tritonserver", "--host", "0.0.0.0", "--log", "-"]
