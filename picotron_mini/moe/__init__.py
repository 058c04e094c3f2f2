"""Mixture of experts on many ranks: how tokens find their experts, and which rank holds which."""
