"""What a trained language model can do: measured on any local checkpoint."""
