"""Runs: whole folders to files, records and provenance; never prints."""
