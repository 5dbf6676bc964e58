"""Phase 2: reflections, refinements, filters, pairs, rounds. ``esjax.evolve(config, run_dir)`` runs the whole method.

See ``esjax.api.evolve``.
"""
