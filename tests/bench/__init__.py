"""What vitviz costs in time and memory, as multiples of plain forward passes: ``make bench``."""
