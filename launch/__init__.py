"""The `harness` command: starts runs on this machine and looks at them. Never imports torch."""
