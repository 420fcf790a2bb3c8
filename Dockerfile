# geneformer-fast on an NVIDIA card:
#
#   docker build -t geneformer-fast .
#   docker run --rm --gpus all geneformer-fast
#   docker run --rm --gpus all -v "$PWD":/data geneformer-fast embed cells.h5ad --model model --out embeddings.npy
#
# CUDA's libraries come with torch's wheel and ptxas with Triton's, so the base image needs neither. The driver is the
# host's: the NVIDIA Container Toolkit puts it into the container. Cards before Turing (V100) need a wheel of torch for
# CUDA 12: --build-arg PIP_EXTRA_INDEX_URL=<the index of those wheels>.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY geneformer_fast geneformer_fast
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
# Triton compiles a few lines of C for every kernel it launches. The versions are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/*.whl /wheels/
RUN set -- /wheels/*.whl \
    && pip install --no-cache-dir --constraint /wheels/constraints.txt "$1[hf,plot,profile,train,zarr]" \
    && useradd --uid 1000 --create-home cells \
    && install --directory --mode=1777 /cache /data
# What is compiled on first use is kept here, for any user; mount a volume to keep it between runs.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XDG_CACHE_HOME=/cache \
    NUMBA_CACHE_DIR=/cache/numba \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib
USER 1000
WORKDIR /data
ENTRYPOINT ["geneformer-fast"]
CMD ["doctor"]
