"""What turns gradients into learning: the optimizer, its learning-rate schedule, and the one training step."""
