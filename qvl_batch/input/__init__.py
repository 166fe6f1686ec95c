"""Files to rows: which files the input has, which of their rows are left, and those rows as tables."""
