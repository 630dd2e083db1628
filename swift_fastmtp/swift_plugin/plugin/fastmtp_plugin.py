"""For `swift ... --external_plugins "$(fastmtp plugin-path)"`.

Alone in its folder, because ms-swift puts the folder of a plugin file on `sys.path`.
"""

from ..register import register

register()
