"""Base against adapters as something to look at: variety, divergence, tables, figures, and one self-contained page."""
