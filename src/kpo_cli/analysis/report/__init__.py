"""Pages, figures, tables and words of what the other two wings found."""
