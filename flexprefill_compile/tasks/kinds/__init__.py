"""The long-context tasks themselves: one file a task."""
