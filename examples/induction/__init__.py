"""The induction experiment of the paper's Figure 1a."""
