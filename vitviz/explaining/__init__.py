"""Explaining: samples → explanations or failures, in batches; never files."""
