"""Text to batches of tokens: read (`sources`, `files`, `records`), encode (`tokenizer`, `chat`), pack, collate."""
