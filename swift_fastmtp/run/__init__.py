"""`fastmtp run`: the whole way from prompts to a measured head, as a list of the other verbs' commands."""
