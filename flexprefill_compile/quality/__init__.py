"""What sparse prefill loses on a real model: measured per attention call and in the model's own predictions."""
