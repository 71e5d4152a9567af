"""Files of every dialect to parameters, and back."""
