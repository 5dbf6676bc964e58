"""What a model should not learn or say: signs of crisis, personal data, a life of its own. No JAX."""
