"""The runtime: SGLang, extended through its plugin entry points. The only room that imports it."""
