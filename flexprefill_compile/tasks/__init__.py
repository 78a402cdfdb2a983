"""Long-context tasks, made from seeds and without a network, and ``flexprefill evaluate``, which runs them.

One file a family makes samples, listed in registry; scoring scores them after a dense and a sparse prefill, comparison
puts both side by side, and summary prints them.
"""
