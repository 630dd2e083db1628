"""The glue to ms-swift and nothing else.

`register()` (register.py) adds to ms-swift's own registries: model type, loss type, tuner type, dataset. It is
called by `autoload`, which a `.pth` file of the installed package starts, or by the plugin file whose path
`fastmtp plugin-path` prints. This file stays empty of imports: every Python process of the environment reads it.
"""
