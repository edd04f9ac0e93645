"""The ingot, from the top.

`reader` (reading one: what cannot be proved is refused) over `manifest`, `files` (a directory or,
by `stored_zip`, a zip), `plan_json` (a program as JSON and back), `strict_json` (JSON from
strangers, by schema) and `safetensors_file` (read and written); and `writer` (there whole or not at
all).
"""
