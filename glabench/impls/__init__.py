"""One implementation a file; its id is the file's stem. `glabench.registry` finds them."""
