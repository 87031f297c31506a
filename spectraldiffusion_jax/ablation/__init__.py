"""What each part is worth: the cells, their runs, and the table."""
