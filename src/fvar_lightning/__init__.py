"""Visual autoregressive modelling by next-focus prediction (FVAR, arXiv 2511.18838)."""

__version__ = "0.1.0"
