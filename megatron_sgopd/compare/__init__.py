"""Methods side by side: the same prompts and seeds, a table with intervals."""
