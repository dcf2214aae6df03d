"""The kernels' room: attention backends for blended batches, on GPU and CPU. Empty so far."""
