"""Where backbones come from: every source becomes a Hugging Face folder. No JAX."""
