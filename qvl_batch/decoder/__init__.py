"""Features and prompts to answers: tokens, the KV cache, prefill and decode steps, continuous batching."""
