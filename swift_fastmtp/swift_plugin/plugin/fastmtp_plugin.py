"""For `swift ... --external_plugins "$(fastmtp plugin-path)"`.

Alone in its folder, because ms-swift puts the folder of a plugin file on `sys.path`.
"""

from swift_fastmtp.swift_plugin.register import register

register()
