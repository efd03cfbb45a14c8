"""The ten claims of PaST, whichever model they are tried on: rules, what is tested, pictures."""
