"""What lessons draw."""
