"""The shell of Gatehouse: the only package that knows Ray, HTTP and vLLM."""

__version__ = "0.1.0"
