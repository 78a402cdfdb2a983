"""From a lifted site to block selection and FlexAttention over the selected blocks. Never refuses."""
