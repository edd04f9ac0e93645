"""Text on both sides of a model: `tokenizer`, `chat` (templates), `text_model` (text in, text out)
with its `completion`, and `calibration` (the texts over which weights are encoded).
"""
