"""CSV -> figures, without torch: one module a verb, and what they share."""
