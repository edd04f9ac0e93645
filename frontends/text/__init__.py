"""Text in and out of a model: `special_tokens` (out of a directory's files), `tokenizer`,
`model_tokenizer` (of a directory, as transformers builds it), `chat`
(chat templates) over `render_template` (a process with a sandbox), `text_model` (generation from
text) with `prompts` (what callers give) and `completion` (results, stop strings),
`generation_config` (what of a model's is not done), and `calibration` (texts for GPTQ).
"""
