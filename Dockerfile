# BlendServe on SGLang with CUDA 13: docker build -t blendserve . && docker run --gpus all ...
# The toolkit stays in the image: FlashInfer compiles kernels with nvcc at first use.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-venv python3.12-dev make g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /blendserve
COPY . .
RUN make setup-gpu PYTHON=python3.12

# Compiled kernels and batches outlive a container that has a volume here.
ENV PATH=/blendserve/.venv-gpu/bin:$PATH \
    FLASHINFER_WORKSPACE_BASE=/data \
    TRITON_CACHE_DIR=/data/triton \
    BLENDSERVE_BATCH_DIR=/data/batches
VOLUME /data
EXPOSE 30000
ENTRYPOINT ["blendserve"]
CMD ["serve", "--host", "0.0.0.0"]
