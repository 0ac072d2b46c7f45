"""The paper's models, layouts for them, and the command that combines the two."""
