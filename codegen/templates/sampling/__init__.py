"""The next tokens: `sample` chooses them by what `drawing` does to a row of logits, and `feed`
makes the inputs of the next step of them.
"""
