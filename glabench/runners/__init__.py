"""One runner a verb: what a command does, without how it is typed or printed."""
