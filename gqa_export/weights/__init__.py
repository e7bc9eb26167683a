"""Where every weight of a graph comes from, in which number format, and where it is put."""
