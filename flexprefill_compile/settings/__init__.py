"""What a user may set: checked when made, hashable, with defaults by device."""
