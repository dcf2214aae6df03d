"""Attention for blended batches: long prefill chunks and many decodes at once, shared prefixes.

Knows torch and Triton, not SGLang: ``blendserve.runtime`` makes a backend of it. ``reference`` is
what every kernel is tested against, ``batch`` and ``groups`` describe what is to be computed,
``cpu`` and ``gpu`` compute it.
"""
