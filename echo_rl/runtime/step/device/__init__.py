"""Serves a step whose decisions stay on the device: fixed sizes a bucket, nothing read before the end, graphs.

In the order of a step: `rule` (may the device decide this?), `buckets` (how large), `inputs` (what the
host knows, sent ahead), `drafter` and `verification` (the two bodies that run without the host),
`results` (what they leave, read in one copy). `buffers` and `graphs` know the device; `step` joins all.
"""
