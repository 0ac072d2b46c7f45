"""The paper's models, layouts for them, and the command that joins the two."""
