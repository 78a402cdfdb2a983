"""Graph to graph: find attention in a dynamo graph and rewrite it."""

if not __name__.startswith("flexprefill_compile."):
    raise ImportError("import flexprefill_compile.passes; as 'passes' it would be a second copy")
