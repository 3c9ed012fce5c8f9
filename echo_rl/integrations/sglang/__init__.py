"""A plugin for stock SGLang: its speculation decided by this package's controllers.

`plugin` is the entry point, `contract` what it expects of SGLang, `steering` the decision itself, and
`adaptive` (chains) and `trees` the two ways in which SGLang carries it out. SGLang is imported inside
functions alone, so every module can be read without it.
"""
