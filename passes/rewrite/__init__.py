"""From an attention site to block selection and FlexAttention. Never refuses."""
