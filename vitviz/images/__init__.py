"""Images: found, decoded and fitted to a model; never what a model makes of them."""
