"""A ViT trained on images."""
