"""The tasks themselves. Law: one file a task, which makes one sample from a request and knows no model."""
