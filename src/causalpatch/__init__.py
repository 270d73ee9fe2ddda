"""Activation patching for any PyTorch or Hugging Face model."""
