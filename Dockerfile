# Two images from one file:
#   docker build --target cpu  -t structmoe-neox:cpu  .      any machine
#   docker build --target cuda -t structmoe-neox:cuda .      machines with NVIDIA GPUs (run with --gpus all)
# TORCH_INDEX_URL names another package index for torch. Use it if your default index does not have the build that you want.

# ---------------------------------------------------------------- a CPU image
FROM python:3.11-slim AS cpu
ARG TORCH_INDEX_URL=""
ENV DEBIAN_FRONTEND=noninteractive DS_ACCELERATOR=cpu PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 neox \
    && install --directory --owner=neox --group=neox /home/neox/structmoe-neox
USER neox
WORKDIR /home/neox/structmoe-neox
COPY --chown=neox:neox . .
RUN make setup-run TORCH_INDEX_URL="$TORCH_INDEX_URL"
ENV PATH=/home/neox/structmoe-neox/.venv/bin:$PATH
CMD ["make", "help"]

# ---------------------------------------------------------------- a CUDA image; the devel base has nvcc, for DeepSpeed's and our own operators
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu22.04 AS cuda
ARG TORCH_INDEX_URL=""
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
# Ubuntu 22.04 has Python 3.11 in its own archive; openssh and pdsh are what DeepSpeed's launcher reaches other hosts with.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make build-essential ninja-build python3.11 python3.11-dev python3.11-venv openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 neox \
    && install --directory --owner=neox --group=neox /home/neox/structmoe-neox
USER neox
WORKDIR /home/neox/structmoe-neox
COPY --chown=neox:neox . .
RUN make setup-run PYTHON=python3.11 TORCH_INDEX_URL="$TORCH_INDEX_URL"
ENV PATH=/home/neox/structmoe-neox/.venv/bin:$PATH
CMD ["make", "help"]
