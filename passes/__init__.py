"""Graph to graph: find attention in a dynamo graph and rewrite it.

Imports point one way: sparse_prefill -> rewrite -> lift -> match -> graph.
"""

if not __name__.startswith("flexprefill_compile."):
    raise ImportError("import flexprefill_compile.passes; as 'passes' it would be a second copy")
