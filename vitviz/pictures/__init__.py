"""Pictures: relevance as heat, colours, overlays and sheets; never how it was computed."""
