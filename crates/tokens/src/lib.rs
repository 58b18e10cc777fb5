//! Prompt to token ids: chat template, tokenizer, prefix cache.
