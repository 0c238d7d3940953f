"""Whole calls of a model as compiled programs, without Dynamo between them.

A call is traced once per kind (:mod:`capture`), cut into regions of which repeated blocks share one
(:mod:`regions`), and later calls of the kind run the compiled regions one after the other
(:mod:`dispatch`).
"""
