"""Tasks and metrics for language models."""
