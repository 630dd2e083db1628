"""The paper's method inside a transformers model."""
