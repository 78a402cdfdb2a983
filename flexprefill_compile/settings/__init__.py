"""What a user may set. Law: every value is checked when it is made, and hashes."""
