"""One module a verb of the `latentzoom` command: `main(argv) -> exit status`."""
