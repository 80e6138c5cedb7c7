"""What trained models can do: recall, length extrapolation, and evaluation tasks."""
