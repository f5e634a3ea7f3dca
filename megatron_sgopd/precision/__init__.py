"""What lower precision does to log-probs, measured before it is trained with."""
