"""The next tokens: `sample` chooses them by what `drawing` does to a row of logits."""
