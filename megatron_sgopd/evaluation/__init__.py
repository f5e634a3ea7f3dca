"""How good a model is: sampled responses, verified, and what they say with its uncertainty."""
