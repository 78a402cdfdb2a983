"""What several commands use. Law: nothing here knows a single command."""
