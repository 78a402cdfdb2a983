"""A real model on real text: what each way to attend costs and loses, beside dense attention in the same run."""
