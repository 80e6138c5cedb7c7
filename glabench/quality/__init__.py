"""What a trained model can do: suites that run on any local checkpoint, offline."""
