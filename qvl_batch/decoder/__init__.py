"""Conversations and features to answers: template, tokenizer, KV cache, prefill and decode steps, batching."""
