"""Visual autoregressive modelling by next-focus prediction (FVAR, arXiv 2511.18838).

Public names are loaded when they are asked for (PEP 562); `__init__.pyi` says where they lie.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
