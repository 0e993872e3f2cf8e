"""ViT on CIFAR with adapters: `python -m vision fit --config configs/vision/...`."""
