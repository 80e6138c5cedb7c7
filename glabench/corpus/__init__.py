"""Text -> token shards on disk: sources, tokenizers, shards, and the manifest that says what they are."""
