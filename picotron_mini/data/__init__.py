"""Text to batches: `corpus` -> `tokenizer` -> `packing` -> `loader`, and `bigram` as the mark to beat."""
