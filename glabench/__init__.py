"""glabench: honest benchmarks of gated linear attention and the layers it is compared with."""

__version__ = "0.1.0"
