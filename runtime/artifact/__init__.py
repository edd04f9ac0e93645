"""The ingot, from the top.

`reader` (reading one: what cannot be proved is refused) over `manifest`, `files` (a directory or,
by `stored_zip`, a zip), `strict_json` (JSON from strangers), `plan_json` (a program as JSON and
back) and `safetensors_data`; and `writer` (there whole or not at all).
"""
