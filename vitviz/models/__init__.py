"""Models: names, weights, tokens, labels and preprocessing; never images or maps."""
