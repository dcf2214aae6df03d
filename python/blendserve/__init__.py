"""BlendServe: throughput-aware offline batch inference on the SGLang runtime."""

__version__ = "0.1.0"
