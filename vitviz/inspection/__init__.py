"""Inspection: the parts of a model, measured from one traced run; never prints."""
