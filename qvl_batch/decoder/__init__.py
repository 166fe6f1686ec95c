"""Features and prompts to answers: tokenizer, KV cache, prefill and decode steps, continuous batching."""
