"""Methods: what each computes of a forward pass, and from what; never files or pictures."""
