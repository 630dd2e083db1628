"""A model folder as files: configuration, tensors by name, fingerprint, quantization; nothing is built or run."""
