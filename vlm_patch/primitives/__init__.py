"""The few pure edits that papers share."""
