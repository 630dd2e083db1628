"""FastMTP for stock ms-swift and stock SGLang: train, export and measure multi-token-prediction draft heads."""

__version__ = "0.1.0"
