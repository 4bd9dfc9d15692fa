"""What gradclip's integrations save in their frameworks, measured: the table of docs/frameworks.md."""
