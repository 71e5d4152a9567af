"""The tree that decodes fastest for these heads and this device."""
