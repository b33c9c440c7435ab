"""One file a stage: its configuration, its inputs, how it is built, and how others read what it has written."""
