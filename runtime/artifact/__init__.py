"""The ingot: the artifact of ahead-of-time compilation, read and written.

`reader` (opens and validates one) over `manifest`, `files` (a directory or, by `stored_zip`, a
zip), `plan_json` (a program as JSON), `strict_json` (schema validation of untrusted JSON) and
`safetensors_file` (read and written); `writer` over `atomic_write` (whole or not at all).
"""
