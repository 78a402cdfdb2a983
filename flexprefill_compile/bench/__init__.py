"""What sparse prefill costs and gains in time: measured here, printed by the commands ``bench`` and ``bench-model``."""
