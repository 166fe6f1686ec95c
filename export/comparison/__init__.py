"""Compares a bundle with its checkpoint in PyTorch, or with another bundle, on the same questions.

    questions ─ both sides answer ─ measures of each row ─ parts on disk ─ summary ─ verdict, page
                (traces)            (measures)             (records)       (summary)   (page)

A side turns questions into traces: token ids of the row, image features, tokens of the answer
and their logits. All measures compare two traces or, with `--layers`, two lists of hidden states.

Only `reference` imports torch, and only when a checkpoint is compared.
"""
