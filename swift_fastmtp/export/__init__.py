"""Trained heads as folders that stock SGLang and vLLM serve."""
