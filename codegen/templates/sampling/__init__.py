"""The next tokens: `sample` chooses them by what `drawing` does to a row of logits, `feed`
makes the inputs of the next step of them, and `draft` what drafting needs of a step.
"""
