"""What one sparse prefill kept and lost, per attention call, layer and head."""
