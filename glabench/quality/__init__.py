"""What trained language models can do: length extrapolation, recall, and evaluation tasks."""
