"""For `swift ... --external_plugins "$(fastmtp plugin-path)"`.

Alone in its folder, because ms-swift puts the folder of a plugin file on `sys.path`.
"""

from swift_fastmtp.swift_plugin.compat_swift import check, print_errors_as_lines

print_errors_as_lines()
check()  # before the plugin's other files, which import what is looked at

from swift_fastmtp.swift_plugin.register import register  # noqa: E402

register()
