"""What a training logs of its adapters."""
