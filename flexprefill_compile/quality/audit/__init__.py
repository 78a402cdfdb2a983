"""What one sparse prefill kept and lost, by call and head. Law: what is measured is the compiled prefill itself."""
