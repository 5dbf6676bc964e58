"""Phase 2: reflections, refinements, filters, pairs, rounds."""
