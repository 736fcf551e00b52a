"""The report: maps of a folder as one page for the browser; never explains an image."""
