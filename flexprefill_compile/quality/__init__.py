"""What sparse prefill loses on a real model. Law: this room calculates and returns data; commands print it."""
