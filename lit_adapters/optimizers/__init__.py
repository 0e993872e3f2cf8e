"""Parameter groups for optimisers."""
