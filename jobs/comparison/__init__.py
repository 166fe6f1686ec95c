"""A bundle against its checkpoint in PyTorch, or against another bundle, on the same questions.

    questions ─ both sides answer ─ measures of each row ─ parts on disk ─ summary ─ verdict, page
                (traces)            (measures)             (records)       (summary)   (page)

A side turns questions into traces: token ids of the row, image features, tokens of the answer
and their logits. Everything that is measured is measured between two traces, or, with
`--layers`, between two lists of hidden states.

Only `reference` imports torch, and only when a checkpoint is compared.
"""
