"""What is measured of generated and reconstructed images: extractors, generation figures, alias and detail metrics.

Names are loaded when they are asked for; `__init__.pyi` says where they lie.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
