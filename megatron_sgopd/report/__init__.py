"""One HTML page about one or many runs."""
