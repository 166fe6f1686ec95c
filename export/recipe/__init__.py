"""A recipe: the precision of each part of the model, chosen by measuring.

    sample ─► fp32 graphs: answers, hidden states                                  (reference)
           ─► all parts in int8, int8wo, int4wo: own errors, bytes, seconds        (measures, cost)
           ─► from cheapest to most exact: one part's precision after another      (choice)
           ─► bundles along this way, compared on the sample, until the bound is met as cheaply as possible  (search)

A part is one that a comparison's layer plot has: the patch embedding, a vision block, the merger, a decoder layer, the
head.
"""
