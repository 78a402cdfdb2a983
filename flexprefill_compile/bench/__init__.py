"""``flexprefill bench`` and ``flexprefill bench-model``: what sparse prefill costs and gains."""
