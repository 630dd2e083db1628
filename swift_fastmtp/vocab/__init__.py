"""The draft's vocabulary: token maps."""
