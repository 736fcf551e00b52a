"""Evaluation: methods measured side by side on a user's own images; never prints."""
