"""Training a language model: settings, data order, schedule, checkpoints, the loop."""
