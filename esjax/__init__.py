"""esjax: language models learn personal emotional support by self-evolution, natively in JAX."""

__version__ = "0.1.0"
